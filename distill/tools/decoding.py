"""Records outside of a reader: how many tokens have a target, which records are damaged. Loads torch when used."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distill.cache.header import CacheHeader
from distill.cache.ranks import load_ranks
from distill.cache.store import Store
from distill.config.errors import CacheError

_BLOCK = 64
"""Samples decoded at one time."""


class RecordDecoder:
    """Decodes the records of one cache."""

    def __init__(self, store: Store, header: CacheHeader):
        """Raises CacheError: a damaged table of ranks."""
        from distill.cache import record
        from distill.cache.codecs import make_codec

        self._header = header
        self._codec = make_codec(header.codec, header.vocab_size)
        self._ids_by_rank = load_ranks(store, header).astype(np.int32)
        self._record = record

    def tokens(self, records: Sequence[bytes], atoms: Sequence[int]) -> int:
        """How many tokens of some records, with so many atoms each, have a target; CacheError: not a record."""
        total = 0
        for first in range(0, len(records), _BLOCK):
            end = first + _BLOCK
            try:
                total += self._valid(records[first:end], atoms[first:end])
            except ValueError as error:
                raise CacheError("a record verifies and cannot be decoded") from error
        return total

    def undecodable(self, records: Sequence[bytes], atoms: Sequence[int]) -> list[int]:
        """Which of some records, with so many atoms each, are not records of this cache's codec."""
        bad, left = [], list(range(len(records)))
        while left:
            try:
                self._valid([records[i] for i in left], [atoms[i] for i in left])
                break
            except ValueError as error:
                bad.append(left.pop(int(error.args[0])))
        return sorted(bad)

    def _valid(self, records: Sequence[bytes], atoms: Sequence[int]) -> int:
        """Tokens that have a target; ValueError: the place of a record that is none."""
        raws = list(map(self._record.Raw, records, atoms))
        decoded = self._record.decode(raws, self._header.sample_tokens, self._ids_by_rank, self._codec)
        return int(decoded.valid_T.sum())
