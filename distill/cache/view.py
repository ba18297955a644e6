"""A view of a cache: the shards that count, and which of them holds the newest record of each sample. No torch."""

import os
import tempfile
import threading
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.cache.header import CacheHeader
from distill.cache.ledger import LedgerReader, Retired, ShardRow, ledgers, outside
from distill.cache.shard import Shard
from distill.cache.store import Store, reported
from distill.config.errors import CacheError

Array = NDArray[Any]

_ENTRY = np.dtype([("shard", np.int32), ("place", np.int32), ("step", np.int64)])
_OPEN_SHARDS, _OPEN_SLOW = 64, 512
"""Shards whose indexes a view keeps in memory; more in a slow store."""


class Published(NamedTuple):
    """Rows of all ledgers, by (writer, seq)."""

    rows: list[ShardRow]
    """Shards that count; of two records of a sample and a step the later one wins."""
    retired: list[ShardRow]
    """Shards whose records lie elsewhere now; their files may be gone."""


def settle(entries: Iterable[ShardRow | Retired]) -> Published:
    """Which rows count, of all that the ledgers hold."""
    entries = list(entries)
    rows = sorted((each for each in entries if isinstance(each, ShardRow)), key=lambda row: (row.writer, row.seq))
    kept = outside(rows, [each for each in entries if isinstance(each, Retired)])
    names = {row.shard for row in kept}
    return Published(kept, [row for row in rows if row.shard not in names])


def ledger_readers(store: Store, header: CacheHeader) -> list[LedgerReader]:
    """One for each ledger of a cache."""
    return [LedgerReader(store, name, header.identity) for name in ledgers(store)]


def published(store: Store, header: CacheHeader) -> Published:
    """Reads all ledgers; CacheError as `LedgerReader.poll`."""
    return settle(entry for reader in ledger_readers(store, header) for entry in reader.poll())


def open_shard(store: Store, header: CacheHeader, row: ShardRow) -> Shard:
    """The shard of a row; CacheError as `Shard`, and when it has samples that the corpus does not have."""
    shard = Shard(store, row)
    ids = shard.columns.sample_ids
    if len(ids) and int(ids.max()) >= header.samples:
        raise CacheError(f"{shard.name}: does not fit a corpus of {header.samples} samples")
    return shard


class Places(NamedTuple):
    """Where the newest record of each of some samples lies."""

    shards: NDArray[np.int64]
    """Number of the shard; -1: there is no record."""
    places: NDArray[np.int64]
    """Place in the shard."""
    steps: NDArray[np.int64]
    """The teacher's step; -1: there is no record."""


class Newest:
    """A table of the newest record of each sample, in a nameless file, so that memory does not grow with the corpus.

    Each process makes its own from the shards' verified indexes, so that the table is never stale. One thread may look
    up records while another adds shards.
    """

    def __init__(self, samples: int):
        """Raises CacheError when the system has no room for a table of so many samples."""
        size = max(samples, 1) * _ENTRY.itemsize
        with reported("TMPDIR"):
            folder = tempfile.gettempdir()
        with reported(f"a table of {samples} samples in {folder}"):
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the mapping)
            # Zeros, so that shards are counted from 1 in here. Reserved, since a disk that fills up while a mapping is
            # written kills the process with SIGBUS.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, size)
            else:  # macOS
                self._file.truncate(size)
            self._table = np.memmap(self._file, _ENTRY, "r+", shape=(max(samples, 1),))
        self._keys: list[Any] = []
        self._lock = threading.Lock()
        self.covered = 0
        """Samples that have a record."""

    def add(self, sample_ids: Array, steps: Array, key: Any = None) -> None:
        """Adds the next shard, with the ids and steps of its records.

        Of two records of a sample the greater step wins, then the shard with the greater key, by default the later one.
        """
        number = len(self._keys)
        self._keys.append(number if key is None else key)
        with self._lock:
            here = self._table[sample_ids]
            old = here["shard"] - 1
            self.covered += len(np.unique(sample_ids[old < 0]))
            wins = (old < 0) | (steps > here["step"])
            ties = (old >= 0) & (steps == here["step"])
            for other in np.unique(old[ties]).tolist():
                wins |= ties & (old == other) & (self._keys[number] > self._keys[other])
            places = np.flatnonzero(wins)
            # Of a sample that is there twice the last assignment counts.
            places = places[np.argsort(steps[places], kind="stable")]
            entries = np.empty(len(places), _ENTRY)
            entries["shard"], entries["place"], entries["step"] = number + 1, places, steps[places]
            self._table[sample_ids[places]] = entries

    def find(self, sample_ids: Array) -> Places:
        """Places of the samples' newest records."""
        with self._lock:
            here = self._table[sample_ids]
        shards = here["shard"].astype(np.int64) - 1
        return Places(shards, here["place"].astype(np.int64), np.where(shards < 0, -1, here["step"]))

    def of(self, number: int, sample_ids: Array) -> NDArray[np.int64]:
        """Places in shard `number`, whose samples are `sample_ids`, of the records that count."""
        found = self.find(sample_ids)
        return np.flatnonzero((found.shards == number) & (found.places == np.arange(len(sample_ids))))

    def steps(self, sample_ids: Array) -> NDArray[np.int64]:
        """Step of the record that counts, -1 where there is none."""
        return self.find(sample_ids).steps


class Group(NamedTuple):
    """Those of some samples whose newest records lie in one shard."""

    number: int
    """Of the shard."""
    indexes: NDArray[np.int64]
    """Which of the samples."""
    places: NDArray[np.int64]
    """Of their records in the shard."""


class View:
    """Shards of a cache and a table of their newest records. One thread may read while another adds."""

    def __init__(self, store: Store, header: CacheHeader):
        self.store, self.header = store, header
        self.rows: list[ShardRow] = []
        self.newest = Newest(header.samples)
        size = _OPEN_SLOW if store.slow else _OPEN_SHARDS
        self.open = lru_cache(size)(lambda number: open_shard(store, header, self.rows[number]))

    def add(self, rows: list[ShardRow]) -> None:
        """Adds shards in any order; CacheError as `open_shard`, then none is added."""
        indexes = self.store.map(lambda row: open_shard(self.store, self.header, row).columns, rows)
        self.rows += rows
        for row, columns in zip(rows, indexes, strict=True):
            self.newest.add(columns.sample_ids, columns.steps, (row.writer, row.seq))

    def groups(self, sample_ids: Array) -> Iterator[Group]:
        """The samples that have a record, by shard."""
        found = self.newest.find(sample_ids)
        order = np.argsort(found.shards, kind="stable")
        order = order[np.searchsorted(found.shards[order], 0) :]
        for here in np.split(order, np.flatnonzero(np.diff(found.shards[order])) + 1) if len(order) else ():
            yield Group(int(found.shards[here[0]]), here, found.places[here])


def newest_since(store: Store, header: CacheHeader, step: int) -> Newest:
    """The table of what has been published of the teacher's step `step` and later ones; CacheError as `open_shard`."""
    view = View(store, header)
    view.add([row for row in published(store, header).rows if row.last_step >= step])
    return view.newest
