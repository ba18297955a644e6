"""Records outside of a reader: their tokens, and those of format 1 written anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from distill.cache import record
from distill.cache.codecs import make_codec
from distill.cache.header import CacheHeader
from distill.cache.ranks import invert, load_ranks
from distill.cache.record import Decoded, Raw
from distill.cache.shard import Array
from distill.cache.store import Store
from distill.cache.v1.record import decode as decode_old
from distill.cache.v1.shard import OldShard
from distill.config.errors import CacheError
from distill.tools.repack import Piece

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

    def renew(self, shard: OldShard, keep: Array) -> Piece:
        """The samples at the places `keep` of a shard of format 1, as today's records.

        Atoms and entropies stay what they are; the byte of log p(label) gets its nearest neighbour of the new scale.
        """
        rank_of_id = invert(self.ids_by_rank.astype(np.uint32))
        try:
            decoded = decode_old([shard.record(i) for i in keep.tolist()], self.ids_by_rank, self.header.codec.name)
        except ValueError as error:
            raise CacheError(f"{shard.name} is damaged: {error}") from error
        encoded = record.encode(
            decoded.atoms,
            decoded.label_logprob_T.numpy(),
            decoded.entropy_T.numpy(),
            decoded.valid_T.numpy(),
            self.header.sample_tokens,
            rank_of_id,
            self.codec,
        )
        columns = shard.columns.take(keep)._replace(atoms=encoded.atoms)
        data, bounds = encoded.records.tobytes(), [0, *encoded.ends.tolist()]
        records = [data[a:b] for a, b in pairwise(bounds)]
        origin = shard.row.origins[0]
        if len(keep) < shard.row.samples:
            origin = dataclasses.replace(origin, samples=len(keep), tokens=int(decoded.valid_T.sum()))
        return Piece(columns, records, (origin,), len(data))
