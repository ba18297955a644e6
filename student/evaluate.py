"""Held-out evaluation: loss, perplexity, calibration, accuracy, and agreement with a teacher."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distill.config.errors import DataError
from distill.data.join import Batch
from distill.engine.dist import Dist
from losses import mixed_loss
from losses.calibration import bin_confidence, expected_calibration_error


class Evaluation(NamedTuple):
    """Over all valid held-out tokens; loss in nats per token, ece, accuracy and agreement as shares."""

    loss: float
    perplexity: float
    ece: float
    accuracy: float
    agreement: float | None
    """None: no teacher was given."""
    tokens: int
    corpora: dict[str, Evaluation]
    """The same of each corpus that has valid tokens; theirs is empty."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    names: Sequence[str],
    dist: Dist,
    *,
    bins: int = 15,
    chunk: int = 4096,
    teacher: nn.Module | None = None,
) -> Evaluation:
    """Every rank gives its own batches, each of one corpus; the result is that of all of them. Collective.

    Args:
        names: of the corpora, in the batches' order.
        bins: equal-width confidence bins of the expected calibration error.
        chunk: tokens whose logits live at one time.
        teacher: agreement is the share of tokens on which both put the same id first.

    Raises:
        DataError: no token carries loss.
    """
    training = model.training
    model.eval()
    # Of each corpus C: loss, tokens, hits, agreements.
    sums_C4 = torch.zeros(len(names), 4, dtype=torch.float64, device=dist.device)
    calibration_C3B = torch.zeros(len(names), 3, bins, dtype=torch.float64, device=dist.device)
    for batch in batches:
        corpus = int(batch.corpus_B[0])
        assert (batch.corpus_B == corpus).all(), "one corpus per batch"
        batch = batch.to(dist.device)
        labels_T, valid_T = batch.labels_BS.flatten(), batch.valid_BS.flatten()
        loss_sum, best_T, confidence_T = _predict(model, batch, chunk)
        hit_T = best_T == labels_T
        agreed = torch.zeros_like(loss_sum)
        if teacher is not None:
            agreed = ((_predict(teacher, batch, chunk)[1] == best_T) & valid_T).sum()
        sums_C4[corpus] += torch.stack([x.double() for x in (loss_sum, valid_T.sum(), (hit_T & valid_T).sum(), agreed)])
        calibration_C3B[corpus] += bin_confidence(confidence_T[valid_T], hit_T[valid_T], bins)
    model.train(training)
    sums_C4, calibration_C3B = dist.sum(sums_C4), dist.sum(calibration_C3B)
    if not sums_C4[:, 1].sum():
        raise DataError("no label of the held-out samples carries loss: evaluate more samples, or mask less of them")
    corpora = {
        name: _evaluation(sums_4, calibration_3B, teacher is not None, {})
        for name, sums_4, calibration_3B in zip(names, sums_C4, calibration_C3B)
        if sums_4[1]
    }
    return _evaluation(sums_C4.sum(0), calibration_C3B.sum(0), teacher is not None, corpora)


def _evaluation(sums_4: Tensor, calibration_3B: Tensor, agrees: bool, corpora: dict[str, Evaluation]) -> Evaluation:
    loss_sum, tokens, hits, agreed = sums_4.tolist()
    ece = expected_calibration_error(calibration_3B).item()
    loss = loss_sum / tokens
    agreement = agreed / tokens if agrees else None
    return Evaluation(loss, math.exp(loss), ece, hits / tokens, agreement, int(tokens), corpora)


def _predict(model: nn.Module, batch: Batch, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Loss summed over valid tokens, and per token the most probable id and its probability."""
    labels_T, valid_T = batch.labels_BS.flatten(), batch.valid_BS.flatten()
    best, confidence = [], []

    def tap(start: int, logits_TV: Tensor, lse_T: Tensor) -> None:
        top_T, ids_T = logits_TV.max(-1)
        best.append(ids_T)
        confidence.append((top_T - lse_T).exp())

    def head(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        return mixed_loss(hidden_TD, weight_VD, labels_T, valid_T.float(), chunk=chunk, tap=tap).loss_sum

    loss_sum, _ = model(batch.ids_BS, batch.documents_BS, head, batch.images)
    return loss_sum, torch.cat(best), torch.cat(confidence)
