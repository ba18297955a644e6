"""Held-out evaluation of a run's models, and job=evaluate."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from distill.config import stop
from distill.config.errors import ConfigError, DataError, DivergenceError
from distill.config.schema import TrainConfig
from distill.data.join import Batch, Joiner
from distill.model import Transformer
from distill.model.precision import numerics_of
from distill.run.models import check_vision, load_model, parts_of
from distill.run.run import Run, as_job
from student import evaluate as student_evaluate
from student import needle_test
from student.evaluate import Evaluation


@as_job
def evaluate(run: Run) -> None:
    """job=evaluate: loss, perplexity, calibration, accuracy, agreement; loss by position, needles in haystacks."""
    config = run.config
    assert config.init_from is not None
    model = load_model(Path(config.init_from), "student", parts=parts_of(run))
    teacher = None
    if config.evaluate.teacher_from is not None:
        teacher = load_model(Path(config.evaluate.teacher_from), "teacher", parts=parts_of(run))
    run.prepare(config.student.model.vocab_size)
    for folder, part in ((config.init_from, model), (config.evaluate.teacher_from, teacher)):
        if part is not None:
            if run.data.tokenizer.vocab_size > part.config.vocab_size:
                raise ConfigError(
                    f"data.tokenizer has {run.data.tokenizer.vocab_size} ids; the model in {folder} has "
                    f"{part.config.vocab_size}: set data.tokenizer.file to its tokenizer"
                )
            check_vision(f"vision of the model in {folder}", part.config.vision, config.data, run.data.tokenizer)
            part.to(run.dist.device, numerics_of(config.precision, run.dist.device).dtype)
    run.start()
    result = evaluate_whole(run, model, teacher)
    measured = held_out_metrics(run, result) | {k: v for k, v in result.metrics().items() if k != "loss"}
    by_length = length_entries(run, model, result)
    row = measured | {name: value for name, value in by_length.items() if isinstance(value, float)}
    run.tracker.log("evaluate", 0, row, {})
    width = max(map(len, row))
    for name, value in row.items():
        run.tracker.message(f"{name:>{width}}  " + (f"{value:.4f}" if isinstance(value, float) else f"{value:,}"))
    run.finish({**measured, **by_length})


def held_out(run: Run, samples: int | None, batch: int) -> Iterator[Batch]:
    """This rank's held-out batches: the first `samples` of every held-out corpus (None: all)."""
    corpora = list(run.data.held_out.values())
    joiner = Joiner(corpora, None, run.config.cache.on_missing)
    for index, corpus in enumerate(corpora):
        count = len(corpus) if samples is None else min(samples, len(corpus))
        mine = np.arange(run.dist.rank, count, run.dist.world)
        for start in range(0, len(mine), batch):
            ids_B = mine[start : start + batch]
            yield joiner.batch(np.full(len(ids_B), index), ids_B)


def evaluate_whole(run: Run, model: nn.Module, teacher: nn.Module | None = None, role: str | None = None) -> Evaluation:
    """On the whole held-out text (`evaluate.samples`). Collective.

    Args:
        role: of the model, where this run has trained it; None: it is that of `init_from`.

    Raises:
        DivergenceError: the loss of model or teacher is not finite.
    """
    e = run.config.evaluate
    batches, names = stop.checked(held_out(run, e.samples, e.batch)), list(run.data.held_out)
    result = student_evaluate.evaluate(model, batches, names, run.dist, bins=e.calibration_bins, teacher=teacher)
    problem = "the loss on held-out text is not finite"
    if not math.isfinite(result.loss):
        if role is not None:
            raise run.diverged(role, problem)
        raise DivergenceError(f"the model of init_from={run.config.init_from}: {problem}")
    if result.agreement is not None and not math.isfinite(result.agreement):
        raise DivergenceError(f"the teacher of evaluate.teacher_from={e.teacher_from}: {problem}")
    return result


def glance(run: Run, model: nn.Module, train: TrainConfig) -> dict[str, float]:
    """Metrics on the first held-out samples, for curves. Collective."""
    micro = max(1, train.batch // (run.dist.world * train.accumulation))
    batches, names = held_out(run, train.eval_samples, micro), list(run.data.held_out)
    return held_out_metrics(run, student_evaluate.evaluate(model, batches, names, run.dist))


def held_out_metrics(run: Run, result: Evaluation) -> dict[str, float]:
    """`heldout_loss` and, of a mixture, `heldout_loss/<corpus>` and `heldout_accuracy/<corpus>`."""
    row = {"heldout_loss": result.loss}
    if len(run.data.held_out) > 1:
        for name, part in result.corpora.items():
            row |= {f"heldout_loss/{name}": part.loss, f"heldout_accuracy/{name}": part.accuracy}
    return row


def model_entries(run: Run, name: str, result: Evaluation) -> dict[str, Any]:
    """Summary entries of a model: `<name>_loss`; `<name>_accuracy` on `evaluate.accuracy_on`; and, of a mixture,
    `<name>_corpora`, loss and accuracy on each corpus."""
    entries: dict[str, Any] = {f"{name}_loss": result.loss}
    if (on := run.config.evaluate.accuracy_on) is not None:
        if on not in result.corpora:
            raise DataError(f"evaluate.accuracy_on is {on}; none of its held-out labels that were read carries loss")
        entries[f"{name}_accuracy"] = result.corpora[on].accuracy
    if len(run.data.held_out) > 1:
        entries[f"{name}_corpora"] = {
            corpus: {"loss": part.loss, "accuracy": part.accuracy} for corpus, part in result.corpora.items()
        }
    return entries


def length_entries(run: Run, model: Transformer, result: Evaluation) -> dict[str, Any]:
    """Summary entries on what length does to a model: its loss by position, and whether it finds a needle in a
    haystack; some are only for the report's charts. Collective."""
    e = run.config.evaluate
    chunk_size, trained_tokens = model.config.chunk_size, e.trained_tokens or run.config.data.sample_tokens
    entries: dict[str, Any] = {}
    if e.needle.lengths:
        run.tracker.message(f"needle in a haystack: lengths {', '.join(map(str, e.needle.lengths))}")
        counts = needle_test.find(model, run.data.tokenizer, e.needle, e.batch, run.config.seed, run.dist)
        entries |= needle_test.entries(counts, e.needle, chunk_size, trained_tokens)
    first, last, loss, tokens = map(list, zip(*result.by_position))
    by_position = {"first": first, "last": last, "loss": loss, "tokens": tokens}
    return entries | {"loss_by_position": by_position | {"chunk_size": chunk_size, "trained_tokens": trained_tokens}}
