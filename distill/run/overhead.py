"""What capture costs the teacher: its own training with and without, in turns on the same batches."""

import shutil
import statistics
import time

from distill.config import stop
from distill.data.prefetch import Prefetch
from distill.run.caches import cache_folders, open_capture
from distill.run.run import Run
from distill.run.trainer import Trainer
from teacher.pretraining import TeacherRecipe

PAIRS = 5


def capture_overhead(run: Run, trainer: Trainer) -> float:
    """Median over pairs of blocks of (seconds with capture / seconds without) - 1, a share; for when training is done.

    The steps are real ones, optimizer, prefetch and writer thread included, but leave no trace. A block is as long as
    it takes to publish one shard, into a cache that is thrown away.
    """
    folder = run.folder / "overhead.tmp"
    if run.dist.is_main:
        shutil.rmtree(folder, ignore_errors=True)
    run.dist.barrier()
    folders = {name: str(folder / name) for name in cache_folders(run)}
    capture = open_capture(run, {}, folders, run.lineages["teacher"].base)
    head_chunk = trainer.config.head_chunk
    recipes = {True: TeacherRecipe(head_chunk, capture), False: TeacherRecipe(head_chunk, None)}
    length = -(-run.config.cache.shard_samples * run.dist.world // trainer.config.batch)

    def block(on: bool, steps: int) -> float:
        began = time.perf_counter()
        with Prefetch(lambda step: trainer.feed.batch(step % trainer.steps), 0, steps) as batches:
            for batch in stop.checked(batches):
                trainer.rehearse(recipes[on], batch)
        capture.flush()
        return time.perf_counter() - began

    try:
        with trainer.engine.rehearsal():
            block(True, 2)  # warms up
            ratios = []
            for pair in range(PAIRS):
                seconds = {on: block(on, length) for on in ((True, False) if pair % 2 else (False, True))}
                ratios.append(seconds[True] / seconds[False] - 1.0)
        capture.close()
        run.dist.barrier()  # every rank has written its last file
    finally:
        capture.close()
        # Also after an error: the folder may be what filled the disk.
        if run.dist.is_main or stop.asked() is not None:
            shutil.rmtree(folder, ignore_errors=True)
    run.dist.barrier()
    return statistics.median(ratios)
