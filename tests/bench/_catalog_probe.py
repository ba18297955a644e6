"""One process of the bench `catalog`: `python -m tests.bench._catalog_probe WHAT DIR [N]` prints JSON.

open: seconds and MiB that a reader takes beyond what the imports do. reads: seconds of N reads of one random sample
each. Runs with format 2, too, on the work tree of its last commit: it imports what both have.
"""

import json
import sys
import time

import numpy as np
import torch

from tests.bench._resident import resident_mb


def digests_of(sample_ids: np.ndarray) -> np.ndarray:
    return (sample_ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)


def main(what: str, folder: str, count: int) -> dict[str, float]:
    torch.set_num_threads(1)
    from distill.cache import CacheReader

    before, began = resident_mb(), time.perf_counter()
    reader = CacheReader(folder)
    results = {"open_s": time.perf_counter() - began, "open_mb": resident_mb() - before}
    if what == "reads":
        ids = np.random.default_rng(0).integers(0, reader.header.samples, count)
        digests = digests_of(ids)
        for number in range(50):
            reader.read(ids[number : number + 1], digests[number : number + 1])
        began = time.perf_counter()
        for number in range(count):
            reader.read(ids[number : number + 1], digests[number : number + 1])
        results["reads_s"] = time.perf_counter() - began
        results["reads_mb"] = resident_mb() - before
    return results


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 0)))
