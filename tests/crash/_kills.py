"""Writers that are killed at random moments, from outside by a clock and from inside at a random call of the system."""

from __future__ import annotations

import os
import random
import select
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Set
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.cache import CacheReader, CacheWriter
from distill.config.errors import CacheError
from distill.config.terminal import Progress
from tests.crash import _checker as checker
from tests.crash import _teacher as teacher
from tests.workers.cache_writers import V

_ZEROS = ("lost", "wrong", "duplicated", "failed")
"""What must never be counted."""
_DEADLINE = 600.0
"""Seconds after which a launch counts as hanging: hundreds of times what it takes."""


class _Aim:
    """How late a kill may come and still find someone alive: seconds of the clock, calls by a process's own hand. Less
    after a miss, more after a hit, so that deaths spread over the whole of a launch on any machine."""

    def __init__(self, rng: random.Random):
        self._rng = rng
        self.most = {"clock": 1.0, "before": 200.0, "after": 200.0, "half": 60.0}

    def next(self) -> tuple[str, float]:
        how = self._rng.choices(list(self.most), [2, 1, 1, 2])[0]
        return how, self._rng.uniform(0, self.most[how])

    def learn(self, how: str, hit: bool) -> None:
        self.most[how] *= 1.04 if hit else 0.85


def run(kills: int, seed: int, progress: Progress) -> tuple[dict[str, Any], list[str]]:
    """Kills `kills` times; counts by name, and every problem in words."""
    rng, counts, problems = random.Random(seed), Counter[str](), list[str]()
    aim = _Aim(rng)
    teacher.prepare()
    with tempfile.TemporaryDirectory(prefix="crash-") as scratch:
        whole = _Run(Path(scratch) / "whole", rng, counts, problems)
        whole.launch(None)
        whole.finish()
        if problems:  # wrong already where nobody is killed
            return {"kills": 0} | {key: counts[key] for key in _ZEROS}, problems
        counts.clear()
        number = 0
        while counts["kills"] < kills or number == 0:
            this = _Run(Path(scratch) / str(number), rng, counts, problems)
            while not this.done and counts["kills"] < kills:
                this.launch(aim)
                progress.update("kills", counts["kills"], kills, amount=1)
            if not this.done:
                this.launch(None)
            this.finish()
            shutil.rmtree(this.folder.parent)
            number += 1
    keys = (
        "kills",
        "by clock",
        "at a call of the system",
        "writers killed",
        "runs",
        "leftovers",
        "records",
    )
    return {key: counts[key] for key in keys + _ZEROS}, problems


class _Run:
    """One cache, from its creation until the plan is done.

    What must be there follows from the plan and from what the processes have recorded, whichever of them was quicker:
    of a sample's targets the greatest step counts, and a writer leaves out what the cache has from a later step.
    """

    def __init__(self, folder: Path, rng: random.Random, counts: Counter[str], problems: list[str]):
        self.folder, self._rng, self._counts, self._problems = folder / "cache", rng, counts, problems
        folder.mkdir()
        self.start, self.done, self._launches = 0, False, 0
        self.now = checker.CheckedCache()
        self._claimed: set[tuple[int, int]] = set()
        self._follower: CacheReader | None = None

    def bad(self, what: str, problem: str) -> None:
        self._counts[what] += 1
        self._problems.append(f"{what}: {self.folder.parent.name}, launch {self._launches}: {problem}")

    def launch(self, aim: _Aim | None) -> None:
        """Starts all processes, kills them as is aimed, None: does not, and checks everything."""
        self._launches += 1
        parts = teacher.parts(self.start, self._rng.choice([1, 1, 2, 3]))
        marks = [self.folder.parent / f"{self._launches}-{part.name}" for part in parts]
        how, when = aim.next() if aim else ("", 0.0)
        death = teacher.Death(1 + int(when), how) if how not in ("", "clock") else None
        victim = self._rng.randrange(len(parts))
        until = time.monotonic() + (when if how == "clock" else _DEADLINE)
        pids = [
            teacher.child(self.folder, part, mark, death if i == victim else None)
            for i, (part, mark) in enumerate(zip(parts, marks, strict=True))
        ]
        codes = _wait(pids, until)
        hit = any(code < 0 for code in codes)
        if hit and how != "clock" and time.monotonic() >= until:
            self.bad("failed", f"hangs: {codes}")
        if aim:
            aim.learn(how, hit)
            self._counts["kills"] += hit
            self._counts["by clock" if how == "clock" else "at a call of the system"] += hit
            self._counts["writers killed"] += sum(code < 0 for code in codes)
        for code, mark in zip(codes, marks, strict=True):
            if code > 0:
                self.bad("failed", mark.with_suffix(".trace").read_text())
        reached = [int(mark.read_text()) if mark.exists() else None for mark in marks]
        self._check(parts, reached)
        self.done = all(code == 0 for code in codes)
        # As a run resumes from the last checkpoint that all ranks have.
        self.start = max(self.start, min(self.start if step is None else step for step in reached[:-1]))
        if self.start == teacher.STEPS and not self.done:
            self.start = teacher.STEPS - 1  # ranks are done, the backfill is not: some work is left to all

    def finish(self) -> None:
        """The whole plan is there, once, and nothing else."""
        self._counts["runs"] += 1
        self._counts["records"] += sum(map(len, self.now.records.values()))
        for key in self._missing(teacher.expected()):
            self.bad("lost", f"{key} is not there at the end")
        for name in os.listdir(self.folder / "shards"):
            source = "backfill" if name == "fill" else "capture"
            CacheWriter(self.folder, teacher.make_header(), writer=name, source=source).close()
        after = checker.scan(self.folder)
        more = {place for place, _ in after.shards.items() ^ self.now.shards.items()}
        # Who was killed before anything was published begins now.
        if after.temporary or more != {(name, 0) for name, _ in more if (name, 0) not in self.now.shards}:
            self.bad("wrong", f"left over: {after.temporary}, {more}")

    def _missing(self, keys: Set[tuple[int, int]]) -> list[tuple[int, int]]:
        """Without those whose sample has a record of a later step, which a resumed writer does not make again."""
        winners = self.now.winners()
        return [key for key in sorted(keys) if winners.get(key[0], -1) < key[1]]

    def _check(self, parts: list[teacher.Part], reached: list[int | None]) -> None:
        before, self.now = self.now, checker.scan(self.folder)
        for problem in self.now.problems:
            self.bad("lost", problem)
        if gone := before.shards.items() - self.now.shards.items():
            self.bad("lost", f"shards that had been published are gone or changed: {gone}")
        self._counts["leftovers"] += len(self.now.temporary)
        for part, step in zip(parts, reached, strict=True):
            for number in part.steps if step is not None else []:
                if number < step:
                    at = teacher.BACKFILL if part.source == "backfill" else number
                    self._claimed |= {(i, at) for i in part.samples_of(number)}
        for key in self._missing(self._claimed):
            self.bad("lost", f"{key}: published before a checkpoint, not there")
        self._contents(before)
        if (self.folder / "cache.json").exists():
            self._readers()

    def _contents(self, before: checker.CheckedCache) -> None:
        header = None
        for key, records in self.now.records.items():
            if len(records) > 1:
                self.bad("duplicated", f"{key}: {len(records)} times")
            if key in before.records:
                continue  # in the same shards
            if key not in teacher.expected():
                self.bad("wrong", f"{key} was never put")
                continue
            if header is None:
                header = checker.format_reader.sealed((self.folder / "cache.json").read_bytes())
            want = teacher.targets(*key)
            pairs = iter(zip(want.atoms.ids_N.tolist(), want.atoms.codes_N.tolist(), strict=True))
            atoms = [dict(next(pairs) for _ in range(n)) for n in want.atoms.counts_T.tolist()]
            tokens = checker.tokens(records[0].data, header, list(range(V)))
            difference = checker.first_difference(
                tokens, atoms, want.label_logprob.numpy(), want.entropy.numpy(), want.valid.numpy(), V
            )
            if records[0].digest != int(want.digests[0]):
                difference = "another digest"
            elif records[0].data != teacher.encoded(*key):
                difference = difference or "other bytes than the same targets have when encoded alone"
            if difference:
                self.bad("wrong", f"{key}: {difference}")

    def _readers(self) -> None:
        """A reader that has followed from the beginning, and one that opens now, both agree with the checker."""
        winners = self.now.winners()
        steps = np.array([winners.get(i, -1) for i in range(teacher.SAMPLES)])
        try:
            if self._follower is None:
                self._follower = CacheReader(self.folder)
            self._follower.refresh()
            for reader in (self._follower, CacheReader(self.folder)):
                if (reader.steps(np.arange(teacher.SAMPLES)) != steps).any():
                    self.bad("lost", "a reader has other steps than the checker")
                self._read(reader, winners)
        except CacheError as error:
            self.bad("lost", f"a reader fails: {error}")

    def _read(self, reader: CacheReader, winners: dict[int, int]) -> None:
        ids = np.array(sorted(winners), np.int64)
        if not len(ids):
            return
        want = [teacher.targets(i, winners[i]) for i in ids.tolist()]
        got = reader.read(ids, np.concatenate([b.digests for b in want])).targets
        counts = torch.cat([b.atoms.counts_T for b in want]).long()
        valid = torch.cat([b.valid for b in want])
        rows = torch.arange(len(counts)).repeat_interleave(counts)
        truth = torch.zeros(len(counts), V)
        truth[rows, torch.cat([b.atoms.ids_N for b in want]).long()] = torch.cat([b.atoms.codes_N for b in want]) / 20
        truth[~valid] = 0
        dense = torch.zeros(len(counts), V).scatter_add_(1, got.ids_TK, got.probs_TK)
        if not torch.equal(dense, truth) or not torch.equal(got.covered_T, valid):
            self.bad("wrong", "a reader's targets are not the teacher's")


def _wait(pids: list[int], until: float) -> list[int]:
    """Exit codes of the children, negative: killed. As soon as one is killed, or at `until`, all others are."""
    left, codes = dict.fromkeys(pids), {}
    while left:
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                del left[pid]
        if left and (time.monotonic() >= until or any(code < 0 for code in codes.values())):
            for pid in left:
                os.kill(pid, signal.SIGKILL)
                codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            break
        select.select([], [], [], min(0.002, max(until - time.monotonic(), 0)))
    return [codes[pid] for pid in pids]
