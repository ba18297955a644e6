"""What capture costs the teacher: its own training with and without, in turns on the same batches."""

from __future__ import annotations

import shutil
import statistics
import time

from distill.config import stop
from distill.data.prefetch import Prefetch
from distill.run import build
from distill.run.run import Run
from distill.run.trainer import Trainer
from teacher.pretraining import TeacherStep

PAIRS = 5


def capture_overhead(run: Run, trainer: Trainer) -> float:
    """Median over pairs of blocks of (seconds with capture / seconds without) - 1, a share; for when training is done.

    The steps are real ones, optimizer, prefetch and writer thread included, at learning rate 0. A block is as long as
    it takes to publish one shard, into a cache that is thrown away.
    """
    program = trainer.program
    assert isinstance(program, TeacherStep)
    folder = run.folder / "overhead.tmp"
    if run.dist.is_main:
        shutil.rmtree(folder, ignore_errors=True)
    run.dist.barrier()
    folders = {name: str(folder / name) for name in build.cache_folders(run)}
    capture = build.open_capture(run, {}, folders, run.lineages["teacher"].base)
    length = -(-run.config.cache.shard_samples * run.dist.world // trainer.config.batch)

    def block(on: bool, steps: int) -> float:
        program.capture = capture if on else None
        began = time.perf_counter()
        with Prefetch(lambda step: trainer.batch(step % trainer.steps), 0, steps) as batches:
            for batch in stop.checked(batches):
                trainer.rehearse(batch)
        capture.flush()
        return time.perf_counter() - began

    try:
        block(True, 2)  # warms up
        ratios = []
        for pair in range(PAIRS):
            seconds = {on: block(on, length) for on in ((True, False) if pair % 2 else (False, True))}
            ratios.append(seconds[True] / seconds[False] - 1.0)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # it may be what filled the disk
        raise
    finally:
        capture.close()
        if stop.asked() is not None:
            shutil.rmtree(folder, ignore_errors=True)
    run.dist.barrier()
    if run.dist.is_main:
        shutil.rmtree(folder, ignore_errors=True)
    return statistics.median(ratios)
