"""Held-out evaluation: loss, perplexity, calibration, accuracy, and agreement with a teacher."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distill.data.join import Batch
from distill.engine.dist import Dist
from losses import MixedLoss, mixed_loss
from losses.calibration import bin_confidence, expected_calibration_error
from student import positions


class Evaluation(NamedTuple):
    """Over all valid held-out tokens; loss in nats per token, ece, accuracy and agreement as shares."""

    loss: float
    perplexity: float
    ece: float
    accuracy: float
    agreement: float | None
    """None: no teacher was given."""
    tokens: int
    by_position: list[positions.Bin]

    def figures(self) -> dict[str, float]:
        """Name -> number, without what was not measured."""
        return {k: v for k, v in self._asdict().items() if isinstance(v, int | float)}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    dist: Dist,
    *,
    bins: int = 15,
    chunk: int = 4096,
    teacher: nn.Module | None = None,
) -> Evaluation:
    """Every rank gives its own batches; the result is that of all of them. Collective.

    Args:
        bins: equal-width confidence bins of the expected calibration error.
        chunk: tokens whose logits live at one time.
        teacher: agreement is the share of tokens on which both put the same id first.
    """
    training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=dist.device)  # loss, tokens, hits, agreements
    calibration = torch.zeros(3, bins, dtype=torch.float64, device=dist.device)
    by_position_2N = torch.zeros(2, len(positions.STARTS), dtype=torch.float64, device=dist.device)
    for batch in batches:
        batch = batch.to(dist.device)
        labels_T, valid_T = batch.labels_BS.flatten(), batch.valid_BS.flatten()
        loss, best_T, confidence_T = _predict(model, batch, chunk)
        hit_T = best_T == labels_T
        agreed = torch.zeros_like(valid_T)
        if teacher is not None:
            agreed = (_predict(teacher, batch, chunk)[1] == best_T) & valid_T
        sums += torch.stack([x.sum().double() for x in (loss.loss_sum, valid_T, hit_T & valid_T, agreed)])
        positions.add(by_position_2N, loss.hard_T, valid_T, batch.documents_BS)
        calibration += bin_confidence(confidence_T[valid_T], hit_T[valid_T], bins)
    model.train(training)
    loss_sum, tokens, hits, agreed = dist.sum(sums).tolist()
    ece = expected_calibration_error(dist.sum(calibration)).item()
    mean = loss_sum / tokens
    agreement = agreed / tokens if teacher is not None else None
    by_position = positions.bins(dist.sum(by_position_2N))
    return Evaluation(mean, math.exp(mean), ece, hits / tokens, agreement, int(tokens), by_position)


def _predict(model: nn.Module, batch: Batch, chunk: int) -> tuple[MixedLoss, Tensor, Tensor]:
    """The loss of all valid tokens and of each, and per token the most probable id and its probability."""
    labels_T, valid_T = batch.labels_BS.flatten(), batch.valid_BS.flatten()
    best, confidence = [], []

    def tap(start: int, logits_TV: Tensor, lse_T: Tensor) -> None:
        top_T, ids_T = logits_TV.max(-1)
        best.append(ids_T)
        confidence.append((top_T - lse_T).exp())

    def head(hidden_TD: Tensor, weight_VD: Tensor) -> MixedLoss:
        return mixed_loss(hidden_TD, weight_VD, labels_T, valid_T.float(), chunk=chunk, tap=tap)

    loss, _ = model(batch.ids_BS, batch.documents_BS, head)
    return loss, torch.cat(best), torch.cat(confidence)
