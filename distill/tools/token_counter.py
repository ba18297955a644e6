"""Which tokens of a record have a target, outside of a reader. Loads torch when it is used."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.cache.header import CacheHeader
from distill.cache.ranks import load_ranks
from distill.cache.store import Store

_BLOCK = 64
"""Records decoded at one time."""


class TokenCounter:
    """Decodes the records of one cache to count their tokens."""

    def __init__(self, store: Store, header: CacheHeader):
        """Raises CacheError: a damaged table of ranks."""
        from distill.cache import record
        from distill.cache.codecs import make_codec

        self._record = record
        self._codec = make_codec(header.codec, header.vocab_size)
        self._ids_by_rank = load_ranks(store, header).astype(np.int32)
        self._length = header.sample_tokens

    def __call__(self, records: Sequence[bytes], atoms: Sequence[int]) -> list[int | None]:
        """Tokens with a target in each of some records, with so many atoms each; None: not a record of this codec."""
        return [None if losses is None else len(losses) for losses in self.losses(records, atoms)]

    def losses(self, records: Sequence[bytes], atoms: Sequence[int]) -> list[NDArray[Any] | None]:
        """The label losses, in nats, of the tokens that have a target, of each record; None: as above."""
        losses: list[NDArray[Any] | None] = [None] * len(records)
        for first in range(0, len(records), _BLOCK):
            left = list(range(first, min(first + _BLOCK, len(records))))
            while left:
                raws = [self._record.Raw(records[i], atoms[i]) for i in left]
                try:
                    decoded = self._record.decode(raws, self._length, self._ids_by_rank, self._codec)
                except ValueError as error:  # the place of one that is no record
                    del left[int(error.args[0])]
                else:
                    valid_BS = decoded.valid_T.numpy().reshape(len(left), -1)
                    losses_BS = -decoded.label_logprob_T.numpy().reshape(len(left), -1)
                    for i, losses_S, valid_S in zip(left, losses_BS, valid_BS, strict=True):
                        losses[i] = losses_S[valid_S]
                    break
        return losses
