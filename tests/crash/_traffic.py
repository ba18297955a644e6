"""Two writers, two following readers and two compactions at one time, each killed at random and started again.

Every record is compared with an independent copy: what the teacher said, encoded alone.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from distill.cache import Atoms, CacheReader, CacheWriter
from distill.cache.open_store import open_store
from distill.config.errors import CacheError
from distill.config.terminal import Progress
from distill.tools.compact import compact
from distill.tools.verify import verify
from tests.crash import _checker as checker
from tests.crash import _teacher as teacher
from tests.workers.cache_writers import digests

ROLES = ("writer 0", "writer 1", "reader 0", "reader 1", "compaction 0", "compaction 1")
_ALL = np.arange(teacher.SAMPLES)
_AGE = 20.0
"""Seconds of a view that a purge spares; a reader's view is never so old."""


def run(seconds: float, seed: int, progress: Progress) -> tuple[dict[str, Any], list[str]]:
    """Figures, and every problem found in words."""
    rng, counts, problems = random.Random(seed), Counter[str](), list[str]()
    teacher.prepare()
    with tempfile.TemporaryDirectory(prefix="crash-") as scratch:
        folder = Path(scratch)
        CacheWriter(folder / "cache", teacher.make_header(), writer="w0").close()
        pids = {role: _start(folder, role, rng.randrange(2**30)) for role in ROLES}
        began = time.monotonic()
        while (took := time.monotonic() - began) < seconds:
            time.sleep(rng.uniform(0.02, 0.5))
            for role, pid in pids.items():
                if os.waitpid(pid, os.WNOHANG)[0]:
                    problems.append(f"failed: {role}: {_trace(folder, role).read_text()}")
                    pids[role] = _start(folder, role, rng.randrange(2**30))
            role = rng.choice(ROLES)
            _kill(pids[role])
            pids[role] = _start(folder, role, rng.randrange(2**30))
            counts[role.split()[0] + "s killed"] += 1
            progress.update("seconds", int(took), int(seconds), amount=1)
        for pid in pids.values():
            _kill(pid)
        counts["compactions"] = sum(len(path.read_bytes()) for path in folder.glob("compaction-*.done"))
        problems += _check(folder, counts)
        compact(open_store(folder / "cache"), shard_bytes=4000, purge_age=0)
        problems += _check(folder, counts)
    keys = ("writers killed", "readers killed", "compactions killed", "compactions", "shards", "steps", "records")
    return {"traffic: seconds": seconds} | {f"traffic: {key}": counts[key] for key in keys}, problems


def _trace(folder: Path, role: str) -> Path:
    return folder / f"{role.replace(' ', '-')}.trace"


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _start(folder: Path, role: str, seed: int) -> int:
    """Forks a process that works until it is killed; it ends by itself where something is wrong, with a trace."""
    pid = os.fork()
    if pid:
        return pid
    try:
        kind, number = role.split()
        {"writer": _write, "reader": _read, "compaction": _compact}[kind](folder, int(number), random.Random(seed))
    except BaseException:
        _trace(folder, role).write_text(traceback.format_exc())
    finally:
        os._exit(1)


def ids_of(writer: int, step: int) -> list[int]:
    """Samples that a writer puts at a step: all of its half in 8 steps, in another order each time."""
    order = np.random.default_rng([writer, step // 8]).permutation(teacher.SAMPLES // 2)
    return [2 * i + writer for i in order[step % 8 * 6 : step % 8 * 6 + 6].tolist()]


def _published(folder: Path, writer: int) -> int:
    """Steps of a writer that are published for sure."""
    path = folder / f"writer-{writer}.steps"
    return int(path.read_text()) if path.exists() else 0


def _floor(folder: Path) -> np.ndarray:
    """The least step that each sample must have by now; -1: it may have no record."""
    floor = np.full(teacher.SAMPLES, -1)
    for writer in (0, 1):
        done = _published(folder, writer)
        for step in range(max(done - 16, 0), done):
            floor[ids_of(writer, step)] = step
    return floor


def _write(folder: Path, number: int, rng: random.Random) -> None:
    step = _published(folder, number)
    with CacheWriter(
        folder / "cache", teacher.make_header(), writer=f"w{number}", shard_samples=rng.choice([4, 6, 9]),
        index_every=rng.choice([2, 5]),
    ) as writer:  # fmt: skip
        while True:
            ids = ids_of(number, step)
            each = [teacher.targets(i, step) for i in ids]
            writer.put(
                np.array(ids), digests(ids), Atoms.cat([b.atoms for b in each]),
                *(np.concatenate([b[i] for b in each]) for i in (3, 4, 5)), step=step, tokens_seen=step, teacher="t",
            )  # fmt: skip
            step += 1
            if step % 3 == 0:
                writer.flush()
                teacher.write_number(folder / f"writer-{number}.steps", step)


def _read(folder: Path, number: int, rng: random.Random) -> None:
    reader, before = CacheReader(folder / "cache"), np.full(teacher.SAMPLES, -1)
    while True:
        floor = _floor(folder)
        reader.refresh()
        if rng.random() < 0.1:
            reader = CacheReader(folder / "cache", reader.view)
        steps = reader.steps(_ALL)
        assert (steps >= floor).all(), f"{steps} are not what was published, {floor}"
        assert (steps >= before).all(), f"{steps} go back behind {before}"
        for sample, step, record in zip(_ALL.tolist(), steps.tolist(), reader.records(_ALL), strict=True):
            assert (record is None) == (step < 0)
            assert record is None or (record.step, record.data) == (step, teacher.encoded(sample, step)), "wrong bytes"
        before = steps


def _compact(folder: Path, number: int, rng: random.Random) -> None:
    while True:
        try:
            compact(
                open_store(folder / "cache"), shard_bytes=rng.choice([1500, 4000, 10**6]),
                purge_age=rng.choice([None, _AGE]),
            )  # fmt: skip
        except CacheError as error:
            assert "holds the cache for a tool" in str(error)
            time.sleep(0.05)
        else:
            with (folder / f"compaction-{number}.done").open("ab") as file:
                file.write(b".")


def _check(folder: Path, counts: Counter[str]) -> list[str]:
    """All that is on the disk, by the checker and by a reader that opens now."""
    found = checker.scan(folder / "cache")
    problems = [f"lost: {problem}" for problem in found.problems]
    problems += [f"verify: {problem}" for problem in verify(open_store(folder / "cache")).problems]
    for (sample, step), records in found.records.items():
        if any(record.data != teacher.encoded(sample, step) for record in records):
            problems.append(f"wrong: sample {sample} at step {step}")
    winners = found.winners()
    there = np.array([winners.get(i, -1) for i in range(teacher.SAMPLES)])
    if (there < _floor(folder)).any():
        problems.append(f"lost: {there} are there, {_floor(folder)} were published")
    reader = CacheReader(folder / "cache")
    if (reader.steps(_ALL) != there).any():
        problems.append("lost: a reader sees other steps than the checker")
    counts["shards"], counts["steps"] = len(found.shards), int(there.max())
    counts["records"] = sum(map(len, found.records.values()))
    return problems
