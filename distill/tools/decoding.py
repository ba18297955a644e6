"""Decodes records outside of a reader."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distill.cache import record
from distill.cache.codecs import make_codec
from distill.cache.header import CacheHeader
from distill.cache.ranks import load_ranks
from distill.cache.record import Decoded, Raw
from distill.cache.store import Store
from distill.config.errors import CacheError

_BLOCK = 64
"""Samples decoded at one time."""


class Decoding:
    """Decodes the records of one cache."""

    def __init__(self, store: Store, header: CacheHeader):
        """Raises CacheError: a damaged table of ranks."""
        self.header = header
        self.codec = make_codec(header.codec, header.vocab_size)
        self.ids_by_rank = load_ranks(store, header).astype(np.int32)

    def tokens(self, records: Sequence[bytes], atoms: Sequence[int]) -> int:
        """How many tokens of some samples have a target; CacheError: not a record."""
        total = 0
        for first in range(0, len(records), _BLOCK):
            raws = list(map(Raw, records[first : first + _BLOCK], atoms[first : first + _BLOCK]))
            total += int(self.decode(raws).valid_T.sum())
        return total

    def decode(self, raws: Sequence[Raw]) -> Decoded:
        """CacheError: one is not a record."""
        try:
            return record.decode(raws, self.header.sample_tokens, self.ids_by_rank, self.codec)
        except ValueError as error:
            raise CacheError("a record verifies and cannot be decoded") from error

    def undecodable(self, records: Sequence[bytes], atoms: Sequence[int]) -> list[int]:
        """Which of some records, with so many atoms each, are not records of this cache's codec."""
        raws, found = list(map(Raw, records, atoms)), []
        left = list(range(len(raws)))
        while left:
            try:
                record.decode([raws[i] for i in left], self.header.sample_tokens, self.ids_by_rank, self.codec)
                break
            except ValueError as error:
                found.append(left.pop(int(error.args[0])))
        return sorted(found)
