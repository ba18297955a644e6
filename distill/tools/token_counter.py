"""Tokens of records that have a target, and their label losses, outside of a reader. Loads torch when it is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from distill.cache.header import CacheHeader
from distill.cache.loss_curve import LossSums
from distill.cache.origins import Origin
from distill.cache.ranks import load_ranks
from distill.cache.shard import Array, Columns
from distill.cache.store import Store

if TYPE_CHECKING:
    from distill.cache.record import Decoded, Raw

_BLOCK = 64
"""Records decoded at one time."""


class RecordSums(NamedTuple):
    """Of some records."""

    losses: LossSums
    """Label losses as the records have them, within their byte."""
    tokens: Array
    """Tokens of each record that have a target."""


class TokenCounter:
    """Decodes the records of one cache to count their tokens; torch and the table of ranks are loaded at first use."""

    def __init__(self, store: Store, header: CacheHeader):
        self._store, self._header = store, header

    @cached_property
    def decode(self) -> Callable[[list[Raw]], Decoded]:
        """Decodes records; ValueError with the index of one that is not a record of this codec."""
        from distill.cache import record
        from distill.cache.codecs import make_codec

        codec, length = make_codec(self._header.codec, self._header.vocab_size), self._header.sample_tokens
        ids_by_rank = load_ranks(self._store, self._header).astype(np.int32)
        return lambda raws: record.decode(raws, length, ids_by_rank, codec)

    def sums(self, columns: Columns, records: Sequence[bytes], origins: Sequence[Origin]) -> RecordSums:
        """Sums over samples of a shard, whose records these are; ValueError as `decode`."""
        from distill.cache.record import Raw

        losses, tokens, length = LossSums(), np.zeros(len(records), np.int64), self._header.sample_tokens
        for first in range(0, len(records), _BLOCK):
            some = slice(first, first + _BLOCK)
            decoded = self.decode(list(map(Raw, records[some], columns.atoms[some].tolist())))
            valid, nats = (each.numpy().reshape(-1, length) for each in (decoded.valid_T, decoded.label_logprob_T))
            tokens[some] = valid.sum(1)
            for number in np.unique(columns.origins[some]).tolist():
                is_its = valid & (columns.origins[some] == number)[:, None]
                steps = np.broadcast_to(columns.steps[some][:, None], valid.shape)[is_its]
                losses.add_tokens(origins[number].teacher, origins[number].source, steps, -nats[is_its])
        return RecordSums(losses, tokens)

    def __call__(self, records: Sequence[bytes], atoms: Sequence[int]) -> list[int | None]:
        """Tokens with a target in each of some records, with so many atoms each; None: not a record of this codec.

        Raises:
            CacheError: a damaged table of ranks.
        """
        from distill.cache.record import Raw

        counts: list[int | None] = [None] * len(records)
        for first in range(0, len(records), _BLOCK):
            left = list(range(first, min(first + _BLOCK, len(records))))
            while left:
                raws = [Raw(records[i], atoms[i]) for i in left]
                try:
                    valid_T = self.decode(raws).valid_T
                except ValueError as error:  # the place of one that is no record
                    del left[int(error.args[0])]
                else:
                    for i, count in zip(left, valid_T.reshape(len(left), -1).sum(1).tolist(), strict=True):
                        counts[i] = count
                    break
        return counts
