"""Which shard holds the newest record of a sample: a table in a nameless file, so that memory does not grow.

The table is made from the shards' verified indexes by whoever opens the cache; it is not shared, so never stale.
"""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_ENTRY = np.dtype([("shard", np.int32), ("place", np.int32), ("step", np.int64)])


class Index:
    """For each of `samples` ids the shard number, the place in the shard and the step of its newest record."""

    def __init__(self, samples: int):
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the mapping)
        # Zeros that no one has written take no disk; so shards are counted from 1 in here.
        self._file.truncate(max(samples, 1) * _ENTRY.itemsize)
        self._table = np.memmap(self._file, _ENTRY, "r+", shape=(max(samples, 1),))

    def add(self, number: int, sample_ids: Array, steps: Array, rank_of: Array) -> None:
        """Takes in shard `number`. Of two records the greater step wins, then the greater rank_of[shard]."""
        here = self._table[sample_ids]
        old = here["shard"] - 1
        wins = (old < 0) | (steps > here["step"]) | ((steps == here["step"]) & (rank_of[number] > rank_of[old]))
        places = np.flatnonzero(wins)
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
        block = 1 << 20
        return sum(
            int((self._table["shard"][first : first + block] > 0).sum()) for first in range(0, len(self._table), block)
        )
