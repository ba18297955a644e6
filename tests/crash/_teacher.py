"""A teacher with a plan, which writes a checkpoint after each flush and resumes from there; and how it dies.

The targets of a sample at a step are a function of the two. Everything is made before the children are forked, so
that their time is the cache's.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from distill.cache import Atoms, CacheReader, CacheWriter, make_codec, record
from tests.workers.cache_writers import CapturedBatch, batch, digests, header

SAMPLES, STEPS, WIDTH, EVERY, EPOCH = 96, 32, 6, 4, 16
"""Samples of the corpus; steps of the plan; samples a step; steps from checkpoint to checkpoint; steps an epoch."""
BACKFILL = 10_000
"""The step of the finished teacher that fills every fifth sample beside the one in training."""
CALLS = ("open", "write", "fsync", "link", "replace", "unlink", "close")
"""Of the system, at which a process can be made to die."""


def plan(step: int) -> list[int]:
    """Ids of a step: two epochs over the corpus, in different orders."""
    order = np.random.default_rng(step // EPOCH).permutation(SAMPLES)
    return order[step % EPOCH * WIDTH : (step % EPOCH + 1) * WIDTH].tolist()


def filled() -> list[int]:
    """Ids of the backfill."""
    return list(range(0, SAMPLES, 5))


@cache
def targets(sample: int, step: int) -> CapturedBatch:
    return batch([sample], step=step)


@cache
def encoded(sample: int, step: int) -> bytes:
    """The record of a sample's targets: whichever process writes it, in whichever shard, it has these bytes."""
    batch, head = targets(sample, step), make_header()
    codec = make_codec(head.codec, head.vocab_size)
    statistics = (batch.label_logprob.numpy(), batch.entropy.numpy(), batch.valid.numpy())
    found = record.encode(batch.atoms, *statistics, head.sample_tokens, np.arange(head.vocab_size), codec)
    return found.records.tobytes()


def prepare() -> None:
    """Makes all targets, and loads all compiled code."""
    torch.set_num_threads(1)
    for key in expected():
        encoded(*key)
    # Compiled here once, not by every child at the same time.
    with tempfile.TemporaryDirectory() as folder:
        with CacheWriter(folder, make_header(), writer="w") as writer:
            writer.put(*targets(*sorted(expected())[0]), step=0, tokens_seen=0, teacher="t")
        reader = CacheReader(folder)
        ids = np.flatnonzero(reader.covers(np.arange(SAMPLES)))
        reader.read(ids, digests(ids))


@cache
def expected() -> frozenset[tuple[int, int]]:
    """(sample, step) of the whole plan."""
    return frozenset({(i, step) for step in range(STEPS) for i in plan(step)} | {(i, BACKFILL) for i in filled()})


def make_header() -> Any:
    return header(samples=SAMPLES)


class Death(NamedTuple):
    """Of a process by its own hand, at the `call`-th call of the system."""

    call: int
    how: str
    """before, after; half: half-way through what is written, and only writes are counted."""


class Part(NamedTuple):
    """What one process does: the share of one rank, or the backfill."""

    name: str
    samples_of: Callable[[int], list[int]]
    steps: list[int]
    every: int
    source: str


def parts(start: int, world: int) -> list[Part]:
    """The processes of one launch: ranks that go on from step `start`, and the backfill."""
    ranks = [
        Part(f"rank{r}", lambda step, r=r: plan(step)[r::world], list(range(start, STEPS)), EVERY, "capture")
        for r in range(world)
    ]
    ids = filled()
    units = [ids[i : i + 4] for i in range(0, len(ids), 4)]
    return [*ranks, Part("fill", lambda unit: units[unit], list(range(len(units))), 2, "backfill")]


def work(folder: Path, part: Part, checkpoint: Path) -> None:
    """All steps of a part; `checkpoint` names the step before which everything is published."""
    with CacheWriter(
        folder, make_header(), writer=part.name, shard_samples=5, source=part.source, index_every=3
    ) as writer:
        for number in part.steps:
            ids = part.samples_of(number)
            step = BACKFILL if part.source == "backfill" else number
            if ids:
                each = [targets(i, step) for i in ids]
                writer.put(
                    np.array(ids), np.concatenate([b.digests for b in each]), Atoms.cat([b.atoms for b in each]),
                    *(torch.cat([b[i] for b in each]) for i in (3, 4, 5)), step=step, tokens_seen=step,
                    teacher=part.source,
                )  # fmt: skip
            if (number + 1) % part.every == 0 or number == part.steps[-1]:
                writer.flush()
                write_number(checkpoint, number + 1)


def write_number(path: Path, step: int) -> None:
    """A file that says so, at one stroke."""
    beside = path.with_suffix(".beside")
    beside.write_text(str(step))
    os.replace(beside, path)


def child(folder: Path, part: Part, checkpoint: Path, death: Death | None) -> int:
    """Forks a process that does a part; returns its pid. It exits with 0, or 1 and a trace beside its checkpoint."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if death:
            die(death)
        work(folder, part, checkpoint)
        code = 0
    except BaseException:
        checkpoint.with_suffix(".trace").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def die(death: Death) -> None:
    """From now on, calls of the system are counted."""
    left = [death.call]

    def counted(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= name == "write" or death.how != "half"
            if left[0] == 0:
                if death.how == "half":
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                elif death.how == "after":
                    real(*args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name), name))
