"""What capture costs the teacher: its own step with and without, in turns on the same batches."""

from __future__ import annotations

import shutil
import statistics
import time

from distill.run import build
from distill.run.run import Run
from distill.run.trainer import Trainer
from teacher.step import TeacherStep

PAIRS = 20


def capture_overhead(run: Run, trainer: Trainer) -> float:
    """Median over pairs of (step with capture / step without) - 1, a share; call it when training is done.

    The steps are real ones, optimizer and writer thread included, at learning rate 0 into a cache that is thrown away.
    """
    program = trainer.program
    assert isinstance(program, TeacherStep)
    folder = run.folder / "overhead.tmp"
    if run.dist.is_main:
        shutil.rmtree(folder, ignore_errors=True)
    run.dist.barrier()
    names = build.cache_folders(run)
    capture = build.open_capture(run, {}, {name: folder / name for name in names})
    ratios = []
    try:
        for pair in range(PAIRS + 1):
            batch = trainer.batch(pair % trainer.steps)
            seconds = {}
            for on in (True, False) if pair % 2 else (False, True):
                program.capture = capture if on else None
                began = time.perf_counter()
                trainer.rehearse(batch)
                seconds[on] = time.perf_counter() - began
            ratios.append(seconds[True] / seconds[False] - 1.0)
    finally:
        capture.close()
    run.dist.barrier()
    if run.dist.is_main:
        shutil.rmtree(folder)
    return statistics.median(ratios[1:])  # the first pair warms up
