"""Held-out evaluation: loss, perplexity, calibration, accuracy, and agreement with a teacher."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distill.config.errors import DataError
from distill.data.join import Batch
from distill.engine.dist import Dist
from losses import Mixed, fixed, head_loss
from losses.calibration import bin_confidence, expected_calibration_error
from student import positions


class Evaluation(NamedTuple):
    """Over all valid held-out tokens; loss in nats per token, ece, accuracy and agreement as shares.

    Of a model that has diverged loss is not finite, and of such a teacher agreement is nan.
    """

    loss: float
    perplexity: float
    """inf: more than a float holds."""
    ece: float
    accuracy: float
    agreement: float | None
    """None: no teacher was given."""
    tokens: int
    by_position: list[positions.Bin]
    corpora: dict[str, Evaluation]
    """The same of each corpus that has valid tokens; theirs is empty."""

    def metrics(self) -> dict[str, float]:
        """Name -> number, without what was not measured."""
        return {k: v for k, v in self._asdict().items() if isinstance(v, int | float)}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    names: Sequence[str],
    dist: Dist,
    *,
    bins: int = 15,
    teacher: nn.Module | None = None,
) -> Evaluation:
    """Every rank gives its own batches, each of one corpus; the result is that of all of them. Collective.

    Args:
        names: of the corpora, in the batches' order.
        bins: equal-width confidence bins of the expected calibration error.
        teacher: agreement is the share of tokens on which both put the same id first.

    Raises:
        DataError: no token carries loss.
    """
    training = model.training
    model.eval()
    # Of each corpus C: loss, tokens, hits, agreements, the teacher's loss.
    sums_C5 = torch.zeros(len(names), 5, dtype=torch.float64, device=dist.device)
    calibration_C3B = torch.zeros(len(names), 3, bins, dtype=torch.float64, device=dist.device)
    by_position_C2N = torch.zeros(len(names), 2, len(positions.STARTS), dtype=torch.float64, device=dist.device)
    for batch in batches:
        corpus = int(batch.corpus_B[0])
        assert (batch.corpus_B == corpus).all(), "one corpus per batch"
        batch = batch.to(dist.device)
        labels_T, valid_T = batch.labels_BS.flatten(), batch.valid_BS.flatten()
        ours = _predict(model, batch)
        hit_T = ours.best_T == labels_T
        agreed, taught = torch.zeros_like(valid_T), torch.zeros_like(ours.loss_sum)
        if teacher is not None:
            theirs = _predict(teacher, batch)
            agreed, taught = (theirs.best_T == ours.best_T) & valid_T, theirs.loss_sum
        sums = (ours.loss_sum, valid_T, hit_T & valid_T, agreed, taught)
        sums_C5[corpus] += torch.stack([x.sum().double() for x in sums])
        calibration_C3B[corpus] += bin_confidence(ours.confidence_T, hit_T, valid_T, bins)
        positions.add(by_position_C2N[corpus], ours.hard_T, valid_T, batch.documents_BS)
    model.train(training)
    parts = [_on_host(dist.sum(part)) for part in (sums_C5, calibration_C3B, by_position_C2N)]
    if not parts[0][:, 1].sum():
        raise DataError("no label of the held-out samples carries loss: evaluate more samples, or mask less of them")
    agrees = teacher is not None
    corpora = {name: _evaluation(agrees, {}, *part) for name, *part in zip(names, *parts) if part[0][1]}
    return _evaluation(agrees, corpora, *(part.sum(0) for part in parts))


def _on_host(sums: Tensor) -> Tensor:
    return sums.cpu()


def _evaluation(
    agrees: bool, corpora: dict[str, Evaluation], sums_5: Tensor, calibration_3B: Tensor, by_position_2N: Tensor
) -> Evaluation:
    loss_sum, tokens, hits, agreed, taught = sums_5.tolist()
    ece = expected_calibration_error(calibration_3B).item()
    loss = loss_sum / tokens
    agreement = (agreed / tokens if math.isfinite(taught) else math.nan) if agrees else None
    by_position = positions.bins(by_position_2N)
    try:
        perplexity = math.exp(loss)
    except OverflowError:
        perplexity = math.inf
    return Evaluation(loss, perplexity, ece, hits / tokens, agreement, int(tokens), by_position, corpora)


class _Prediction(NamedTuple):
    loss_sum: Tensor
    """Of all valid tokens, nats."""
    hard_T: Tensor
    best_T: Tensor
    """The most probable id."""
    confidence_T: Tensor
    """Its probability."""


def _predict(model: nn.Module, batch: Batch) -> _Prediction:
    labels_T, valid_T = batch.labels_BS.flatten(), batch.valid_BS.flatten()

    def best(rows: slice, logits_tV: Tensor, lse_t: Tensor) -> tuple[Tensor, Tensor]:
        logit_t, ids_t = logits_tV.max(-1)
        return ids_t, (logit_t - lse_t).exp()

    head_fn = partial(head_loss, row_function=Mixed(labels_T, fixed(valid_T.float()), select=best))
    head, _ = model(batch.ids_BS, batch.documents_BS, head_fn, batch.images)
    ids, confidence = zip(*head.selected)
    return _Prediction(head.loss_sum, head.parts["hard"], torch.cat(ids), torch.cat(confidence))
