"""A cache of 1,000 small shards where a request takes 20 ms: opened, read in the order of capture and at random."""

from __future__ import annotations

import time

import fsspec
import numpy as np

from distill.cache import CacheReader, CacheWriter
from tests.workers.cache_writers import digests, header, put

SECONDS = 0.02
SAMPLES, SHARD, BATCH = 4000, 4, 32


class Slow(fsspec.get_filesystem_class("memory")):
    protocol = "slow"
    store = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    delay = 0.0
    requests = 0

    def cat_file(self, path, start=None, end=None, **options):
        type(self).requests += 1
        time.sleep(self.delay)
        return super().cat_file(path, start=start, end=end, **options)


def run() -> dict[str, float]:
    fsspec.register_implementation("slow", Slow, clobber=True)
    url, results = "slow://cache", {}
    with CacheWriter(url, header(samples=SAMPLES), writer="w", shard_samples=SHARD) as writer:
        for first in range(0, SAMPLES, SHARD):
            put(writer, list(range(first, first + SHARD)))

    def measure(name, call):
        Slow.requests, began = 0, time.perf_counter()
        result = call()
        results.update({f"{name}_seconds": time.perf_counter() - began, f"{name}_requests": float(Slow.requests)})
        return result

    def read(ids):
        for chosen in np.split(ids, range(BATCH, SAMPLES, BATCH)):
            reader.read(chosen, digests(chosen))

    Slow.delay = SECONDS
    reader = measure("open", lambda: CacheReader(url))
    measure("refresh", reader.refresh)
    measure("capture_order", lambda: read(np.arange(SAMPLES)))
    measure("random_order", lambda: read(np.random.default_rng(0).permutation(SAMPLES)))
    Slow.delay = 0.0
    Slow.store.clear()
    return results
