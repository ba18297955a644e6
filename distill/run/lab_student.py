"""One student of a study: the product's own student, with targets or factors changed where the arm says so."""

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from distill.cache import CacheReader, ReadResult
from distill.config.schema import RunConfig, Source
from distill.config.study import LabArm
from distill.data.packed import PackedCorpus
from distill.engine.dist import Dist
from distill.run import build
from distill.run.caches import open_readers
from distill.run.evaluation import evaluate_whole, held_out
from distill.run.run import Run
from distill.run.trainer import to_checkpoints, train
from distill.tracking import jsonl
from distill.tracking.tracker import METRICS
from student.excess import excess


def train_student(config: RunConfig, arm: LabArm, cache: str | None, folder: Path, dist: Dist) -> dict[str, Any]:
    """Trains a student and measures it on held-out text; its run folder is gone afterwards.

    Args:
        cache: cache.dir; None: it reads none.

    Returns:
        What a line of evidence holds of it: held-out measures, mean alpha, tokens, and seconds of processor time.
    """
    config = dataclasses.replace(config, cache=dataclasses.replace(config.cache, dir=cache))
    if not (folder / "checkpoints").exists():
        shutil.rmtree(folder, ignore_errors=True)
    began = time.process_time()
    with Run(config, folder, dist) as run:
        build.prepare(run)
        readers: list[Any] | None = open_readers(run) if config.student.cached else None
        if readers is not None and arm.shuffled:
            readers = [Shuffled(reader, corpus) for reader, corpus in zip(readers, run.data.train.values())]
        trainer, recipe = build.student(run, readers)
        if arm.reversed:
            factors = {name: Reversed(factor) for name, factor in recipe.weighting.factors.items()}
            recipe.weighting.factors = factors  # type: ignore[assignment]
        train(run, {"student": trainer}, lambda _: to_checkpoints(trainer, save_last=False))
        measures = held_out_measures(run, trainer.engine.model)
        trainer.engine.close()
        rows = [row for row in jsonl.read(folder / METRICS) if "alpha" in row]
        measures["alpha"] = float(np.mean([row["alpha"] for row in rows])) if rows else 0.0
        measures["tokens"] = trainer.steps * trainer.clock.tokens_per_step
        measures["seconds"] = time.process_time() - began
    shutil.rmtree(folder)
    return measures


def held_out_measures(run: Run, model: nn.Module) -> dict[str, Any]:
    """Mean loss on held-out text and, where it follows laws, the excess over them, nats."""
    role = run.roles[0]
    found: dict[str, Any] = {"loss": evaluate_whole(run, model, role=role).loss}
    corpora, names = run.config.data.corpora, list(run.data.held_out)
    laws = {name: corpora[name].law for name in names if corpora[name].source is Source.law}
    if laws:
        e = run.config.evaluate
        result = excess(model, held_out(run, e.samples, e.batch), names, laws, run.data.tokenizer, run.dist)
        found |= {"excess": result.excess, "entropy": result.entropy}
        found |= {"corpora": result.corpora} if len(result.corpora) > 1 else {}
    return found


class Shuffled:
    """A cache's reader that gives each sample the targets of another one, half a corpus away."""

    def __init__(self, reader: CacheReader, corpus: PackedCorpus):
        self._reader, self._corpus = reader, corpus

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def read(self, sample_ids: NDArray[np.int64], digests: NDArray[np.uint64]) -> ReadResult:
        others = (np.asarray(sample_ids) + len(self._corpus) // 2) % len(self._corpus)
        return self._reader.read(others, self._corpus.take(others).digests)


class Reversed:
    """A factor of alpha whose value is one minus that of another."""

    def __init__(self, factor: Any):
        self._factor = factor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._factor, name)

    def value(self, *arguments: Any) -> Tensor:
        value: Tensor = 1.0 - self._factor.value(*arguments)
        return value
