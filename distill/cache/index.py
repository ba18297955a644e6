"""Which shard holds the newest record of a sample: a table in a nameless file, so that memory does not grow.

The table is made from the shards' verified indexes by whoever opens the cache; it is not shared, so never stale.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.cache.store import reported

Array = NDArray[Any]

_ENTRY = np.dtype([("shard", np.int32), ("place", np.int32), ("step", np.int64)])


class Index:
    """For each of `samples` ids the shard number, the place in the shard and the step of its newest record."""

    def __init__(self, samples: int):
        """Raises CacheError when the system has no room for the table."""
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
        self._covered = 0

    def add(self, number: int, sample_ids: Array, steps: Array, rank_of: Array) -> None:
        """Takes in shard `number`. Of two records the greater step wins, then the greater rank_of[shard]."""
        here = self._table[sample_ids]
        old = here["shard"] - 1
        self._covered += len(np.unique(sample_ids[old < 0]))
        wins = (old < 0) | (steps > here["step"]) | ((steps == here["step"]) & (rank_of[number] > rank_of[old]))
        places = np.flatnonzero(wins)
        # Of a sample that is there twice the last assignment counts.
        places = places[np.argsort(steps[places], kind="stable")]
        entries = np.empty(len(places), _ENTRY)
        entries["shard"], entries["place"], entries["step"] = number + 1, places, steps[places]
        self._table[sample_ids[places]] = entries

    def find(self, sample_ids: Array) -> tuple[Array, Array, Array]:
        """Shard number (-1: none), place in it, and step (-1: none) of each sample."""
        here = self._table[sample_ids]
        shard = here["shard"].astype(np.int64) - 1
        return shard, here["place"].astype(np.int64), np.where(shard < 0, -1, here["step"])

    def covered(self) -> int:
        """Samples that have a record."""
        return self._covered
