"""Opening, reading and following a cache of 100 million samples in 100,000 shards (SCALE= for a share of it).

`open_s`, `open_mb`: a fresh process opens it; seconds, and MiB beyond what torch and the imports take. `open_mb_of_8`:
the same of eight processes at one time, each (mean). `refresh_ms`: a refresh that finds nothing. `reads_ratio`: random
reads of one sample each, over those of the last commit of format 2 from a work tree of its own, both on 10 million
samples in 10,000 shards, in turns. `compact_gain_time`, `compact_gain_memory`: opening 4,000 shards without a snapshot
over opening them compacted. `listing_s_per_million`, `listing_mb_per_million`: making the listing of the 100 million
from the shards' indexes, and its bytes; `build_mb`: the most memory that takes. `forged_gb`: bytes of shards; nothing
is written with fsync. FOLDER= for another disk; 13.5 GB.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from distill.cache import CacheHeader, CacheReader, cataloging
from distill.cache.format import CATALOG
from distill.cache.open_store import open_store
from distill.cache.publish import create
from tests.bench import _forge

FORMAT_2 = "ac026dbcc38d"
"""The last commit of format 2."""
SAMPLES, SHARDS = 100_000_000, 100_000
SMALL, READS = 10, 10_000
ROOT = Path(__file__).parents[2]


def run() -> dict[str, float]:
    share = float(os.environ.get("SCALE") or 1.0)
    with tempfile.TemporaryDirectory(prefix="catalog-", dir=os.environ.get("FOLDER")) as folder:
        place = Path(folder)
        results = reads(place, int(SAMPLES * share) // SMALL, int(SHARDS * share) // SMALL)
        results |= compacted(place)
        return results | opening(place, int(SAMPLES * share), int(SHARDS * share))


def forged(folder: Path, samples: int, shards: int) -> None:
    header = _forge.cache_header(samples)
    with tempfile.TemporaryDirectory() as other:
        record, atoms = _forge.one_record(Path(other) / "cache", header)
    header = create(open_store(folder), header, None)
    _forge.write(folder, _forge.shard_files(header, record, atoms, shards, "teacher"), shards, folder.name)


def probe(what: str, folder: Path, count: int = 0, tree: Path = ROOT) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", str(Path(__file__).with_name("_catalog_probe.py")), what, str(folder), str(count)]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=tree)


def answer(process: subprocess.Popen[str]) -> dict[str, float]:
    text, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"a process of the bench ended with {process.returncode}")
    return json.loads(text.splitlines()[-1])  # type: ignore[no-any-return]


def opening(place: Path, samples: int, shards: int) -> dict[str, float]:
    folder = place / "large"
    forged(folder, samples, shards)
    store = open_store(folder)
    results = {"forged_gb": store.bytes_in("shards") / 1e9}
    program = (
        "import sys; from tests.bench import catalog, _memory; before = _memory.most_mb(); catalog.build(sys.argv[1]); "
        "print(_memory.most_mb() - before)"
    )
    command = [sys.executable, "-c", program, str(folder)]
    began = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    results["listing_s_per_million"] = (time.perf_counter() - began) / samples * 1e6
    results["build_mb"] = float(done.stdout)
    results["listing_mb_per_million"] = store.bytes_in(CATALOG) / samples
    alone = [answer(probe("open", folder)) for _ in range(3)]
    results |= {name: statistics.median(each[name] for each in alone) for name in ("open_s", "open_mb")}
    eight = [probe("open", folder) for _ in range(8)]
    results["open_mb_of_8"] = statistics.mean(answer(each)["open_mb"] for each in eight)
    reader = CacheReader(folder)
    began = time.perf_counter()
    for _ in range(100):
        reader.refresh()
    results["refresh_ms"] = (time.perf_counter() - began) * 10
    shutil.rmtree(folder)
    return results


def build(folder: Path | str) -> None:
    """Makes the catalog of all shards."""
    store = open_store(folder)
    cataloging.update(store, CacheHeader.load(store), is_merging=True)


def reads(place: Path, samples: int, shards: int) -> dict[str, float]:
    new, old, tree = place / "new", place / "old", place / "tree"
    forged(new, samples, shards)
    build(new)
    add = ["git", "worktree", "add", "--detach", str(tree), FORMAT_2]
    subprocess.run(add, check=True, cwd=ROOT, capture_output=True)
    try:
        forge = Path(__file__).with_name("_format2_forge.py")
        command = [sys.executable, "-P", str(forge), str(old), str(samples), str(shards)]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(tree)}, cwd=tree)
        rates: dict[str, list[float]] = {"new": [], "old": []}
        for _ in range(3):
            rates["new"].append(answer(probe("reads", new, READS))["reads_s"])
            rates["old"].append(answer(probe("reads", old, READS, tree))["reads_s"])
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(tree)], check=False, cwd=ROOT, capture_output=True)
    for folder in (new, old):
        shutil.rmtree(folder)
    return {
        "reads_ratio": statistics.median(b / a for a, b in zip(rates["new"], rates["old"])),
        "reads_per_s": READS / statistics.median(rates["new"]),
        "reads_per_s_format_2": READS / statistics.median(rates["old"]),
    }


def compacted(place: Path, samples: int = 1_024_000, shards: int = 4_000) -> dict[str, float]:
    from distill.tools.compact import compact

    folder = place / "many"
    forged(folder, samples, shards)
    bare = [answer(probe("open", folder)) for _ in range(3)]
    compact(open_store(folder), shard_bytes=512_000_000)
    after = [answer(probe("open", folder)) for _ in range(3)]
    shutil.rmtree(folder)

    def gain(name: str) -> float:
        return statistics.median(each[name] for each in bare) / statistics.median(each[name] for each in after)

    return {"compact_gain_time": gain("open_s"), "compact_gain_memory": gain("open_mb")}
