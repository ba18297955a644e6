"""Speed and size of the cache in use.

One thread for the first three. `encode_tokens_s`, `decode_tokens_s`: atoms of the yardstick, about 7 a token, to
records, and a reader's whole way from disk to padded targets in batches of 8 samples of 1,024 tokens, per second of
the thread's own time. `select_vs_head`: the default codec over the head's product at V = 202,048, hidden 5,120 (bench
`select`). `capture_overhead` and `stall`: teacher and student of the smoke, shortened (paired blocks with capture on
and off; share of the student's time without a batch). `open_ms`, `resident_mb`: 100 million tokens in 1,000 shards,
opened by a fresh process, and what that process has grown by over one that has torch alone after 10,000 reads of
random samples: code, compiled code, index (`process_mb`: all that it has).
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from distill.cache import Atoms, CacheHeader, CacheReader, CacheWriter, cataloging, make_codec, record
from distill.cache.local import LocalStore
from distill.cache.loss_curve import LossSums
from distill.cache.origins import Origin
from distill.cache.publish import create, publish_shard
from distill.cache.shard import Columns
from distill.config.schema import CodecConfig
from tests.bench import select
from tests.bench._resident import resident_mb
from tests.bench._yardstick import VOCAB, rows

SAMPLE, BATCH = 1024, 8
TOKENS, SHARDS, READS = 100_000_000, 1000, 10_000


def run() -> dict[str, float]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        results = speed()
        results["select_vs_head"] = select.run()[f"{CodecConfig().name}_over_head"]
    finally:
        torch.set_num_threads(threads)
    return results | in_training() | at_scale()


def header(samples: int, sample_tokens: int) -> CacheHeader:
    return CacheHeader(VOCAB, "yardstick", "yardstick", sample_tokens, samples, CodecConfig(), 0)


def tokens_of(count: int, distinct: int = 512) -> tuple[Atoms, np.ndarray, np.ndarray]:
    """Atoms, log-probabilities of a label and entropies of `count` tokens: some rows of the yardstick, repeated."""
    codec, parts, first = make_codec(CodecConfig(), VOCAB), [], 0
    for p_TV in rows(distinct, seed=0):
        place_T = torch.arange(first, first + len(p_TV))
        parts.append(
            codec.select(p_TV.log().float(), torch.zeros(len(p_TV)), seed=0, sample_ids_T=place_T, positions_T=place_T)
        )
        first += len(p_TV)
    times = math.ceil(count / first)
    atoms = Atoms.cat([part.atoms for part in parts] * times).select(torch.arange(first * times) < count)
    entropy_T = torch.cat([part.entropy_T for part in parts] * times)[:count].numpy()
    return atoms, -entropy_T, entropy_T


def speed() -> dict[str, float]:
    samples = 8 * BATCH
    atoms, label_T, entropy_T = tokens_of(samples * SAMPLE)
    valid_T, codec = np.ones(len(label_T), bool), make_codec(CodecConfig(), VOCAB)
    encode, decode = [], []
    with tempfile.TemporaryDirectory() as folder:
        ids, digests = np.arange(samples), np.arange(samples, dtype=np.uint64)
        with CacheWriter(folder, header(samples, SAMPLE), writer="teacher-00000", shard_samples=BATCH) as writer:
            writer.put(ids, digests, atoms, label_T, entropy_T, valid_T, step=0, tokens_seen=0, teacher="yardstick")
        reader = CacheReader(folder)
        for _ in range(6):
            began = time.thread_time()
            record.encode(atoms, label_T, entropy_T, valid_T, SAMPLE, np.arange(VOCAB), codec)
            encode.append(time.thread_time() - began)
            began = time.thread_time()
            for first in range(0, samples, BATCH):
                reader.read(ids[first : first + BATCH], digests[first : first + BATCH])
            decode.append(time.thread_time() - began)
    count = float(len(label_T))
    return {
        "encode_tokens_s": count / statistics.median(encode[1:]),
        "decode_tokens_s": count / statistics.median(decode[1:]),
        "atoms_per_token": len(atoms.ids_N) / count,
    }


def in_training() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        common = ["experiment=smoke", "tracking=off", f"data.dir={folder}/data", "evaluate.samples=8"]
        teacher = _job("teacher", Path(folder) / "t", [*common, "teacher.train.steps=400"])
        cache = f"cache.dir={folder}/t/cache"
        student = _job(
            "student", Path(folder) / "s", [*common, cache, "student.train.steps=2000", "student.train.eval_every=0"]
        )
    return {"capture_overhead": teacher["capture_overhead"], "stall": student["stall"]}


def _job(name: str, folder: Path, arguments: list[str]) -> dict[str, float]:
    command = [sys.executable, "-m", "distill", f"job={name}", f"hydra.run.dir={folder}", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    summary: dict[str, float] = json.loads((folder / "summary.json").read_text())
    return summary


def at_scale() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        samples = large_cache(Path(folder))
        runs = [json.loads(subprocess.check_output(fresh_process(folder, samples))) for _ in range(3)]
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    results = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return results | {"stored_gb": size / 1e9}


def large_cache(folder: Path) -> int:
    """The shards of one teacher: the same records under other ids, in random order. Returns the number of samples."""
    per_shard = math.ceil(TOKENS / SHARDS / SAMPLE)
    samples = per_shard * SHARDS
    atoms, label_T, entropy_T = tokens_of(per_shard * SAMPLE)
    codec = make_codec(CodecConfig(), VOCAB)
    encoded = record.encode(atoms, label_T, entropy_T, np.ones(len(label_T), bool), SAMPLE, np.arange(VOCAB), codec)
    store = LocalStore(folder)
    identity = create(store, header(samples, SAMPLE), None).identity
    ids = np.random.default_rng(0).permutation(samples).reshape(SHARDS, per_shard)
    zeros = np.zeros(per_shard, np.int64)
    for step, ids_n in enumerate(ids):
        origin = Origin(
            "yardstick", "capture", step, step, per_shard, per_shard * SAMPLE, step, 2.0, False, 1e9
        )  # fmt: skip
        columns = Columns(ids_n, ids_n.astype(np.uint64), zeros + step, encoded.atoms, zeros)
        publish_shard(
            store,
            identity,
            "teacher-00000",
            step,
            "capture",
            columns,
            encoded.records,
            encoded.ends,
            (origin,),
            LossSums(),
        )
        if step % 50 == 49:
            print(f"\r  {step + 1} of {SHARDS} shards", end="", flush=True)
    print("\r", end="")
    cataloging.update(store, CacheHeader.load(store))
    return samples


def fresh_process(folder: str, samples: int, reads: int = READS) -> list[str]:
    """The command that opens and reads in a process of its own, which prints what it measured as JSON."""
    code = (
        "import torch; from tests.bench._resident import resident_mb; before = resident_mb(); "
        f"from tests.bench.cache import open_and_read; open_and_read({folder!r}, {samples}, {reads}, before)"
    )
    return [sys.executable, "-c", code]


def open_and_read(folder: str, samples: int, reads: int, before: float) -> None:
    torch.set_num_threads(1)
    began = time.perf_counter()
    reader = CacheReader(folder)
    seconds = time.perf_counter() - began
    rng = np.random.default_rng(0)
    began = time.perf_counter()
    for sample in rng.integers(0, samples, reads):
        batch = reader.read(np.array([sample]), np.array([sample], np.uint64))
        assert bool(batch.targets.covered_T.all())
    read = time.perf_counter() - began
    after = resident_mb()
    print(
        json.dumps(
            {
                "open_ms": 1e3 * seconds,
                "resident_mb": after - before,
                "process_mb": after,
                "random_reads_s": reads / read,
            }
        )
    )
