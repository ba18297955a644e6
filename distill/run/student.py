"""job=student: train a student on cached targets, also while the teacher still publishes them."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import numpy as np

from distill.cache import CacheReader, is_created
from distill.config import stop
from distill.config.errors import CacheError, ConfigError
from distill.config.paths import is_url
from distill.run import build, length
from distill.run.run import Run, as_job, check_vision, load_model
from distill.run.trainer import Trainer
from student.distilling import StudentStep

POLL_SECONDS, POLL_FAR_SECONDS = 0.2, 2.0
"""Between two looks for news; each look at an object store is a few requests, which are paid for."""


@as_job
def student(run: Run) -> None:
    train(run)


def train(run: Run) -> None:
    config = run.config
    readers = None
    if config.student.cached:
        if config.cache.follow:
            _await_cache(run)
        readers = build.open_readers(run)
    trainer = build.student(run, readers)
    program = trainer.program
    assert isinstance(program, StudentStep)
    if readers and not config.cache.follow:
        program.know_best([float(np.nanmin(r.stats()["loss"], initial=np.inf)) for r in readers])
    run.restore({"student": trainer})
    every = config.student.train.checkpoint_every or trainer.steps
    while trainer.at < trainer.steps:
        goal = min(trainer.steps, (trainer.at // every + 1) * every)
        if config.cache.follow and readers:
            while trainer.at < goal and not trainer.stopped:
                trainer.advance(_await_targets(run, trainer, readers, goal))
        else:
            trainer.advance(goal)
        run.save({"student": trainer})
    result = run.evaluate(trainer.engine.model, role="student")
    by_length = length.figures(run, trainer.engine.model, result)
    trainer.engine.close()
    tokens = trainer.steps * config.student.train.batch * config.data.sample_tokens
    run.finish(
        {
            "job": "student",
            **run.figures("student", result),
            "ece": result.ece,
            "coverage": program.coverage,
            "stall": trainer.stalled / trainer.seconds if trainer.seconds else None,
            "steps": trainer.steps,
            "tokens": tokens,
            **by_length,
            "seconds": run.seconds,
        }
    )


def ready(trainer: Trainer, readers: list[CacheReader], goal: int) -> int:
    """The step up to which a student may go now: all its samples have been published, or have been left out for good.

    A sample counts as published when every writer of its teacher is past the step that met it, so what a step finds
    does not depend on when it looks (in the teacher's first epoch: of a sample met again the newest targets count).
    """
    stream = readers[0].header.stream
    frontiers = [f for reader in readers if (f := reader.frontier(stream["writers"])) is not None]
    if not frontiers:
        return goal
    frontier = min(frontiers)
    batch = trainer.config.batch
    for block in range(trainer.at, goal, 256):
        stop = min(block + 256, goal)
        steps = trainer.positions(np.arange(block * batch, stop * batch)) // stream["batch"]
        waiting = np.flatnonzero(steps >= frontier)
        if len(waiting):
            return block + int(waiting[0]) // batch
    return goal


def _await_cache(run: Run) -> None:
    deadline = time.monotonic() + run.config.cache.follow_timeout
    while run.dist.is_main and not all(is_created(f) for f in build.cache_folders(run).values()):
        if time.monotonic() > deadline:
            raise CacheError(f"cache.dir is {run.config.cache.dir}; no cache appeared within cache.follow_timeout")
        stop.check()
        time.sleep(_poll_seconds(run))
    run.dist.barrier()


def _poll_seconds(run: Run) -> float:
    return POLL_FAR_SECONDS if is_url(build.cache_root(run)) else POLL_SECONDS


def _await_targets(run: Run, trainer: Trainer, readers: list[CacheReader], goal: int) -> int:
    """The step up to which the student may go, further than now; or the same step, and SIGTERM has stopped it."""
    deadline = time.monotonic() + run.config.cache.follow_timeout
    said = False
    while True:
        # The main rank decides; the others then see at least what it saw.
        news = [reader.refresh() for reader in readers] if run.dist.is_main else [0]
        now = (ready(trainer, readers, goal), stop.asked()) if run.dist.is_main else None
        reach, asked = run.dist.from_main(now)
        if reach > trainer.at:
            if not run.dist.is_main:
                for reader in readers:
                    reader.refresh()
            return int(reach)
        if asked is signal.SIGINT:
            raise stop.Stopped(asked)
        if asked is not None:
            trainer.stopped = True
            return trainer.at
        if any(news):
            deadline = time.monotonic() + run.config.cache.follow_timeout
        if time.monotonic() > deadline:
            raise CacheError(
                f"cache.dir is {run.config.cache.dir}; nothing new was published for {run.config.cache.follow_timeout} "
                "seconds (cache.follow_timeout) and the teacher has not finished"
            )
        if not said:
            run.tracker.message(f"student waits at step {trainer.at} for the teacher")
            said = True
        time.sleep(_poll_seconds(run))


@as_job
def evaluate(run: Run) -> None:
    """job=evaluate: loss, perplexity, calibration, accuracy, agreement; loss by position, needles in haystacks."""
    config = run.config
    assert config.init_from is not None
    model = load_model(Path(config.init_from), "student", None).to(run.dist.device)
    teacher = None
    if config.evaluate.teacher_from is not None:
        teacher = load_model(Path(config.evaluate.teacher_from), "teacher", None).to(run.dist.device)
    for folder, part in ((config.init_from, model), (config.evaluate.teacher_from, teacher)):
        if part is not None:
            if run.data.tokenizer.vocab_size > part.config.vocab_size:
                raise ConfigError(
                    f"data.tokenizer has {run.data.tokenizer.vocab_size} ids; the model in {folder} has "
                    f"{part.config.vocab_size}: set data.tokenizer.file to its tokenizer"
                )
            check_vision(f"vision of the model in {folder}", part.config.vision, config.data, run.data.tokenizer)
    result = run.evaluate(model, teacher)
    row = result.figures()
    del row["loss"]
    measured = run.heldout(result) | row
    by_length = length.figures(run, model, result)
    row = measured | {name: value for name, value in by_length.items() if isinstance(value, float)}
    run.tracker.log("evaluate", 0, row, {})
    width = max(map(len, row))
    for name, value in row.items():
        run.tracker.message(
            f"{name:>{width}}  {value:.4f}" if isinstance(value, float) else f"{name:>{width}}  {value:,}"
        )
    run.finish({"job": "evaluate", **measured, **by_length, "seconds": run.seconds})
