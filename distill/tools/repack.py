"""Records of many shards into few, as bytes; who made them, and of how many tokens, stays exact."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from distill.cache.ledger import Origin, ShardRow
from distill.cache.publish import publish_shard
from distill.cache.shard import Array, Columns, Shard
from distill.tools.common import ToolLedger

MOST_ORIGINS = 2**16
"""Of one shard, in the format."""

Count = Callable[[Sequence[bytes], Sequence[int]], int]
"""Tokens that have a target in some records; the second argument: atoms in each."""


class Piece(NamedTuple):
    """Records that come from one shard."""

    columns: Columns
    records: list[bytes]
    origins: tuple[Origin, ...]
    bytes: int
    """Of the records."""


def piece(shard: Shard, records: Sequence[bytes | None], keep: Array, count: Count) -> Piece:
    """The samples at the places `keep` of a shard.

    records: of all its samples; None where one is damaged and not kept.
    """
    columns, origins = shard.columns, shard.row.origins
    kept: list[bytes] = [data for i in keep.tolist() if (data := records[i]) is not None]
    assert len(kept) == len(keep), "a damaged record is kept"
    size = sum(map(len, kept))
    if len(keep) == shard.row.samples:
        return Piece(columns, kept, origins, size)
    is_kept = np.zeros(shard.row.samples, np.bool_)
    is_kept[keep] = True
    used = np.unique(columns.origins[keep])
    left = []
    for number in used.tolist():
        here = columns.origins == number
        steps = columns.steps[here & is_kept]
        left.append(
            dataclasses.replace(
                origins[number],
                samples=len(steps),
                tokens=_tokens(shard, records, here, is_kept, origins[number], count),
                first_step=int(steps.min()),
                last_step=int(steps.max()),
            )
        )
    part = columns.take(keep)
    return Piece(part._replace(origins=np.searchsorted(used, part.origins)), kept, tuple(left), size)


def _tokens(
    shard: Shard, records: Sequence[bytes | None], here: Array, is_kept: Array, origin: Origin, count: Count
) -> int:
    """Of an origin's kept samples: from the records that are fewer, the kept ones or those left out."""
    atoms = shard.columns.atoms

    def tokens(places: list[int]) -> int:
        found = [data for i in places if (data := records[i]) is not None]
        return count(found, [int(atoms[i]) for i in places])

    inside, outside = np.flatnonzero(here & is_kept).tolist(), np.flatnonzero(here & ~is_kept).tolist()
    known = int(here.sum()) == origin.samples and all(records[i] is not None for i in outside)
    if known and len(outside) < len(inside):
        return origin.tokens - (tokens(outside) if outside else 0)
    return tokens(inside)


class Packer:
    """Collects pieces and publishes a shard whenever it holds `limit` bytes of records."""

    def __init__(self, ledger: ToolLedger, limit: int):
        self._ledger, self._limit = ledger, limit
        self._pieces: list[Piece] = []
        self.rows: list[ShardRow] = []
        """What it has published."""

    def add(self, part: Piece) -> None:
        """Publishes first what waits, if the piece would not fit; CacheError if that fails."""
        if not part.records:
            return
        size = sum(each.bytes for each in self._pieces) + part.bytes
        origins = sum(len(each.origins) for each in self._pieces) + len(part.origins)
        if self._pieces and (size > self._limit or origins > MOST_ORIGINS):
            self.flush()
        self._pieces.append(part)

    def flush(self) -> None:
        """Publishes what waits."""
        if not self._pieces:
            return
        pieces, self._pieces = self._pieces, []
        first = np.cumsum([0] + [len(each.origins) for each in pieces])
        columns = Columns(*(np.concatenate(column) for column in zip(*(each.columns for each in pieces), strict=True)))
        shift = np.repeat(first[:-1], [len(each.records) for each in pieces])
        records = [data for each in pieces for data in each.records]
        ends = np.cumsum([len(data) for data in records], dtype=np.int64)
        origins = tuple(origin for each in pieces for origin in each.origins)
        ledger = self._ledger.get()
        joined = np.frombuffer(b"".join(records), np.uint8)
        del records, pieces
        columns = columns._replace(origins=columns.origins + shift)
        self.rows.append(publish_shard(ledger.store, ledger, self._ledger.kind, columns, joined, ends, origins))
