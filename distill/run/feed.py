"""Which batch a trainer gets at each step, and how far the caches that it reads have come."""

import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distill.cache import CacheReader
from distill.config import stop
from distill.config.errors import CacheError
from distill.config.paths import is_url
from distill.config.schema import CacheConfig
from distill.data.join import Batch, Joiner
from distill.data.stream import Stream
from distill.engine.dist import Dist

POLL_SECONDS, POLL_FAR_SECONDS = 0.2, 2.0
"""Between two checks for new shards; each check of an object store is a few paid requests."""

Positions = Callable[[np.ndarray], np.ndarray]


class Feed:
    """Batches by step: steps -> positions of the stream -> samples -> tokens joined with targets.

    Args:
        positions: maps the trainer's own order 0, 1, 2, ... to positions of the stream (replay).
        batch: samples of an optimizer step, over all ranks.
    """

    def __init__(self, stream: Stream, positions: Positions, joiner: Joiner, batch: int, dist: Dist):
        self.stream, self.positions, self.joiner = stream, positions, joiner
        self.size, self.dist = batch, dist

    def batch(self, step: int) -> Batch:
        """This rank's rows of optimizer step `step`."""
        share = self.size // self.dist.world
        first = step * self.size + self.dist.rank * share
        corpus_B, sample_ids_B = self.stream.at(self.positions(np.arange(first, first + share)))
        return self.joiner.batch(corpus_B, sample_ids_B, step).pinned(self.dist.device)

    def reach(self, step: int, goal: int) -> int | None:
        """The step up to which a trainer at `step` may go now, at most `goal`; None: SIGTERM came first."""
        return goal

    def published(self, readers: Sequence[CacheReader], step: int, goal: int) -> int:
        """The step, from `step` to `goal`, up to which all samples are published, or left out for good.

        A sample counts as published when every writer of its teacher is past the step that captured it, so the targets
        of a step do not depend on timing (in the teacher's first epoch: of a sample that is captured again the
        newest targets count).
        """
        stream = readers[0].header.stream
        frontiers = [f for reader in readers if (f := reader.frontier) is not None]
        if not frontiers:
            return goal
        return self.passed(min(frontiers), stream["batch"], step, goal)

    def passed(self, teacher_step: int, teacher_batch: int, step: int, goal: int) -> int:
        """The step, from `step` to `goal`, up to which all samples are in the first `teacher_step` steps of a teacher
        on the same stream."""
        for block in range(step, goal, 256):
            end = min(block + 256, goal)
            steps = self.positions(np.arange(block * self.size, end * self.size)) // teacher_batch
            waiting = np.flatnonzero(steps >= teacher_step)
            if len(waiting):
                return block + int(waiting[0]) // self.size
        return goal


class FollowingFeed(Feed):
    """The feed of a student that waits for a teacher which is still publishing."""

    def __init__(
        self, readers: Sequence[CacheReader], cache: CacheConfig, message: Callable[[str], None], *arguments: Any
    ):
        super().__init__(*arguments)
        self.readers, self.cache, self.message = readers, cache, message

    def reach(self, step: int, goal: int) -> int | None:
        deadline = time.monotonic() + self.cache.follow_timeout
        announced = False
        while True:
            # The main rank decides; the others refresh after it, so their views hold at least the same shards.
            news, now = [0], None
            if self.dist.is_main:
                news = [reader.refresh() for reader in self.readers]
                now = self.published(self.readers, step, goal), stop.asked()
            reach, asked = self.dist.from_main(now)
            if reach > step:
                if not self.dist.is_main:
                    for reader in self.readers:
                        reader.refresh()
                return int(reach)
            if asked is signal.SIGINT:
                raise stop.Stopped(asked)
            if asked is not None:
                return None
            if any(news):
                deadline = time.monotonic() + self.cache.follow_timeout
            if time.monotonic() > deadline:
                raise CacheError(
                    f"cache.dir is {self.cache.dir}; nothing new was published for {self.cache.follow_timeout} seconds "
                    "(cache.follow_timeout) and the teacher has not finished"
                )
            if not announced:
                self.message(f"student waits at step {step} for the teacher")
                announced = True
            time.sleep(poll_seconds(self.readers[0].folder))


def poll_seconds(cache: Any) -> float:
    return POLL_FAR_SECONDS if is_url(str(cache)) else POLL_SECONDS
