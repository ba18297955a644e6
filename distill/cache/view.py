"""What a cache's ledgers say at this moment, all of them together. No torch."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.cache.header import CacheHeader
from distill.cache.index import Index
from distill.cache.ledger import LedgerReader, Retired, ShardRow, ledgers, outside
from distill.cache.shard import Shard
from distill.cache.store import Store
from distill.config.errors import CacheError


class Published(NamedTuple):
    """Rows of all ledgers."""

    rows: list[ShardRow]
    """Shards that count, by (writer, seq): of two records of a sample and a step the later one wins."""
    retired: list[ShardRow]
    """Shards whose records lie elsewhere now; their files may be gone."""
    ledgers: list[LedgerReader]


def published(store: Store, header: CacheHeader) -> Published:
    """Reads all ledgers; CacheError as `LedgerReader.poll`."""
    readers = [LedgerReader(store, name, header.identity) for name in ledgers(store)]
    found = [each for reader in readers for each in reader.poll()]
    rows = sorted((row for row in found if isinstance(row, ShardRow)), key=lambda row: (row.writer, row.seq))
    kept = outside(rows, [each for each in found if isinstance(each, Retired)])
    names = {row.shard for row in kept}
    return Published(kept, [row for row in rows if row.shard not in names], readers)


def open_shard(store: Store, header: CacheHeader, row: ShardRow) -> Shard:
    """The shard of a row; CacheError as `Shard`, and when it has samples that the corpus does not have."""
    shard = Shard(store, row)
    ids = shard.columns.sample_ids
    if len(ids) and int(ids.max()) >= header.samples:
        raise CacheError(f"{shard.name}: does not fit a corpus of {header.samples} samples")
    return shard


class Newest:
    """Which record of each sample counts, among shards that are added in the order of `Published.rows`."""

    def __init__(self, samples: int):
        self.index = Index(samples)
        self.count = 0
        """Shards so far."""
        self._order = np.arange(1)

    def add(self, sample_ids: NDArray[Any], steps: NDArray[Any]) -> None:
        """Takes in the next shard."""
        if self.count == len(self._order):
            self._order = np.arange(2 * self.count)
        self.index.add(self.count, sample_ids, steps, self._order)
        self.count += 1

    def of(self, number: int, sample_ids: NDArray[Any]) -> NDArray[np.int64]:
        """Places in shard `number`, whose samples are `sample_ids`, of the records that count."""
        shards, places, _ = self.index.find(sample_ids)
        return np.flatnonzero((shards == number) & (places == np.arange(len(places))))

    def steps(self, sample_ids: NDArray[Any]) -> NDArray[np.int64]:
        """Step of the record that counts, -1 where there is none."""
        return self.index.find(sample_ids)[2]


def newest_since(store: Store, header: CacheHeader, step: int) -> Newest:
    """What has been published of the teacher's step `step` and later ones; CacheError as `open_shard`."""
    newest = Newest(header.samples)
    for row in published(store, header).rows:
        if row.last_step >= step:
            columns = open_shard(store, header, row).columns
            newest.add(columns.sample_ids, columns.steps)
    return newest
