"""job=student: train a student on cached targets, also while the teacher still publishes them."""

import time

from distill.cache import CacheHeader, is_created
from distill.config import soft_losses, stop
from distill.config.errors import CacheError, ConfigError
from distill.config.schema import Targets
from distill.run import build, live
from distill.run.caches import cache_folders, cache_root, open_readers
from distill.run.evaluation import evaluate_whole, length_entries, model_entries
from distill.run.feed import poll_seconds
from distill.run.run import Run, as_job
from distill.run.trainer import to_checkpoints, train
from student.live_teacher import LiveTeacher


@as_job
def student(run: Run) -> None:
    if run.config.student.targets is Targets.live:
        return train_student(run, live.frozen(run))
    if run.config.student.cached:
        _check_headers(run, absent=run.config.cache.follow)  # before the data are packed
    build.prepare(run)
    train_student(run)


def train_student(run: Run, teacher: LiveTeacher | None = None) -> None:
    """The job in a run that has its data; teacher: of live targets."""
    readers = None
    if run.config.student.cached and teacher is None:
        if run.config.cache.follow:
            _await_cache(run)
            _check_headers(run)
        readers = open_readers(run)
    trainer, recipe = build.student(run, readers, teacher)
    train(run, {"student": trainer}, lambda _: to_checkpoints(trainer))
    model = trainer.engine.model
    result = evaluate_whole(run, model, role="student")
    by_length = length_entries(run, model, result)
    trainer.engine.close()
    run.finish(
        {
            **model_entries(run, "student", result),
            "ece": result.ece,
            "coverage": recipe.coverage,
            "stall": trainer.clock.stall,
            "steps": trainer.steps,
            "tokens": trainer.steps * trainer.clock.tokens_per_step,
            **by_length,
        }
    )


def _check_headers(run: Run, absent: bool = False) -> None:
    """Raises CacheError for a cache that is not there, unless it may be `absent`, and ConfigError for one whose targets
    the student's loss may not use."""
    for folder in cache_folders(run).values():
        if absent and not is_created(folder):
            continue
        codec = CacheHeader.load(folder).codec.name
        source = f"the cache in {folder}, of codec {codec}"
        if problems := list(soft_losses.refusal(run.config.student, soft_losses.form_of(codec), source)):
            raise ConfigError(*problems)


def _await_cache(run: Run) -> None:
    deadline = time.monotonic() + run.config.cache.follow_timeout
    while run.dist.is_main and not all(is_created(folder) for folder in cache_folders(run).values()):
        if time.monotonic() > deadline:
            raise CacheError(f"cache.dir is {run.config.cache.dir}; no cache appeared within cache.follow_timeout")
        stop.check()
        time.sleep(poll_seconds(cache_root(run)))
    run.dist.barrier()
