"""Records of many shards into few, as bytes; who made them, and of how many tokens, stays exact."""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from distill.cache.ledger import LedgerWriter, Origin, Retired, ShardRow
from distill.cache.publish import publish_shard
from distill.cache.shard import Array, Columns, Shard
from distill.cache.store import Store
from distill.config.errors import CacheError
from distill.tools.token_counter import TokenCounter

MOST_ORIGINS = 2**16
"""Of one shard, in the format."""


class Portion(NamedTuple):
    """Records that come from one shard."""

    columns: Columns
    records: list[bytes]
    origins: tuple[Origin, ...]
    bytes: int
    """Of the records."""


def portion(shard: Shard, records: Sequence[bytes | None], keep: Array, counter: TokenCounter) -> Portion:
    """The samples at the places `keep` of a shard.

    records: of all its samples; None where one is damaged and not kept. Raises CacheError: one is not a record.
    """
    columns, origins = shard.columns, shard.row.origins
    kept: list[bytes] = [data for i in keep.tolist() if (data := records[i]) is not None]
    assert len(kept) == len(keep), "a damaged record is kept"
    size = sum(map(len, kept))
    if len(keep) == shard.row.samples:
        return Portion(columns, kept, origins, size)
    is_kept = np.zeros(shard.row.samples, np.bool_)
    is_kept[keep] = True
    used = np.unique(columns.origins[keep])
    left = []
    for number in used.tolist():
        is_here = columns.origins == number
        steps = columns.steps[is_here & is_kept]
        left.append(
            dataclasses.replace(
                origins[number],
                samples=len(steps),
                tokens=_tokens(shard, records, is_here, is_kept, origins[number], counter),
                first_step=int(steps.min()),
                last_step=int(steps.max()),
            )
        )
    part = columns.take(keep)
    return Portion(part._replace(origins=np.searchsorted(used, part.origins)), kept, tuple(left), size)


def _tokens(
    shard: Shard,
    records: Sequence[bytes | None],
    is_here: Array,
    is_kept: Array,
    origin: Origin,
    counter: TokenCounter,
) -> int:
    """Tokens of an origin's kept samples: from the records that are fewer, the kept ones or those left out."""

    def tokens(places: list[int]) -> int:
        some = [data for i in places if (data := records[i]) is not None]
        counts = [count for count in counter(some, shard.columns.atoms[places].tolist()) if count is not None]
        if len(counts) < len(places):
            raise CacheError(f"{shard.path}: a record verifies and cannot be decoded")
        return sum(counts)

    inside, outside = np.flatnonzero(is_here & is_kept).tolist(), np.flatnonzero(is_here & ~is_kept).tolist()
    is_known = len(inside) + len(outside) == origin.samples and all(records[i] is not None for i in outside)
    if is_known and len(outside) < len(inside):
        return origin.tokens - tokens(outside)
    return tokens(inside)


class Packer:
    """Collects portions and publishes a shard whenever it holds `limit` bytes of records.

    kind: the tool's name, which is its ledger's; the caller holds `alone`.
    """

    def __init__(self, store: Store, kind: str, identity: str, limit: int):
        self._store, self._kind, self._identity, self._limit = store, kind, identity, limit
        self._waiting: list[Portion] = []
        self.rows: list[ShardRow] = []
        """What it has published."""

    @cached_property
    def _ledger(self) -> LedgerWriter:
        """Opened when it is first needed; CacheError when it cannot be."""
        return LedgerWriter(self._store, self._kind, self._identity)

    def add(self, part: Portion) -> None:
        """Publishes first what waits, if the portion would not fit; CacheError if that fails."""
        if not part.records:
            return
        size = sum(each.bytes for each in self._waiting) + part.bytes
        origins = sum(len(each.origins) for each in self._waiting) + len(part.origins)
        if self._waiting and (size > self._limit or origins > MOST_ORIGINS):
            self.flush()
        self._waiting.append(part)

    def flush(self) -> None:
        """Publishes what waits."""
        if not self._waiting:
            return
        parts, self._waiting = self._waiting, []
        first = np.cumsum([0] + [len(each.origins) for each in parts])
        columns = Columns(*(np.concatenate(column) for column in zip(*(each.columns for each in parts), strict=True)))
        shift = np.repeat(first[:-1], [len(each.records) for each in parts])
        records = [data for each in parts for data in each.records]
        ends = np.cumsum([len(data) for data in records], dtype=np.int64)
        origins = tuple(origin for each in parts for origin in each.origins)
        joined = np.frombuffer(b"".join(records), np.uint8)
        del records, parts
        columns = columns._replace(origins=columns.origins + shift)
        self.rows.append(publish_shard(self._store, self._ledger, self._kind, columns, joined, ends, origins))

    def retire(self, rows: Iterable[ShardRow]) -> None:
        """Takes rows out of the cache, whose records lie elsewhere now or are lost."""
        ranges: list[Retired] = []
        for writer, seq in sorted((row.writer, row.seq) for row in rows):
            if ranges and (ranges[-1].ledger, ranges[-1].last + 1) == (writer, seq):
                ranges[-1] = Retired(writer, ranges[-1].first, seq)
            else:
                ranges.append(Retired(writer, seq, seq))
        if ranges:
            self._ledger.retire(ranges)


def in_order(rows: Iterable[ShardRow]) -> list[ShardRow]:
    """As a student comes to them: by step."""
    return sorted(rows, key=lambda row: (min((o.first_step for o in row.origins), default=0), row.writer, row.seq))
