"""How much the soft targets count: alpha_T = schedule(step) x product of factors in [0, 1].

Everything is a pure function or an init / update pair on explicit state. No factor here looks at the label of its own
token, so the fixed point of the loss stays the proper mixture (1 - alpha) q + alpha p and calibration is safe.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


def schedule(kind: str, progress: float, *, peak: float, final: float, warmup: float, decay: float) -> float:
    """Value at `progress` in [0, 1] through a run.

    constant: peak. linear, cosine: from peak to final. wsd: rises linearly from 0 over the first `warmup` share,
    holds peak, falls linearly to final over the last `decay` share.

    Source: wsd tied to a learning rate of the same shape, arXiv 2410.16215 section 3.4.
    """
    assert 0.0 <= progress <= 1.0, progress
    if kind == "constant":
        return peak
    if kind == "linear":
        return peak + (final - peak) * progress
    if kind == "cosine":
        return final + (peak - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
    assert kind == "wsd", kind
    if progress < warmup:
        return peak * progress / warmup
    if progress > 1.0 - decay:
        return peak + (final - peak) * (progress - (1.0 - decay)) / decay
    return peak


class LagState(NamedTuple):
    """student_loss: running average of the student's hard loss; best_teacher_loss: least mean loss of a shard met.

    Both are fp64 nats, one of each corpus, since what is a good loss on one says nothing about another. "Met", not
    "published": the state is then a function of the student's own position, and a run that follows a live teacher
    weighs alike however the two are timed, killed or resumed.
    """

    student_loss: Tensor
    best_teacher_loss: Tensor


def init_lag(vocab_size: int, device: torch.device | str = "cpu", corpora: int = 1) -> LagState:
    """A student that knows nothing (uniform, log V nats) and has met no shard; [corpora] of each number."""
    return LagState(
        torch.full((corpora,), math.log(vocab_size), dtype=torch.float64, device=device),
        torch.full((corpora,), math.inf, dtype=torch.float64, device=device),
    )


def meet(state: LagState, least_shard_loss: Tensor) -> LagState:
    """Takes note of the shards of a batch, before it is weighed; nan (no targets) changes nothing."""
    return state._replace(best_teacher_loss=torch.fmin(state.best_teacher_loss, least_shard_loss))


def update_lag(state: LagState, hard_mean: Tensor, smoothing: float) -> LagState:
    """Takes note of the student's own mean hard loss, after a batch; nan (no tokens) changes nothing."""
    moved = smoothing * state.student_loss + (1.0 - smoothing) * hard_mean
    return state._replace(student_loss=torch.where(moved.isnan(), state.student_loss, moved))


def lag_factor(shard_loss_B: Tensor, state: LagState, power: float) -> Tensor:
    """clip((student - shard) / (student - best), 0, 1) ** power, per sample; nan (no targets) gives 0.

    state: of each sample's corpus [B], or one for all.

    1 where the targets come from the best teacher met, 0 where the teacher that made them was no better than the
    student is now. A student ahead of every teacher gets 0.

    Source: ours. Motivated by arXiv 2410.16215, where early logits of a learning teacher harm at a constant weight.
    """
    ahead = state.student_loss - state.best_teacher_loss
    ratio_B = (state.student_loss - shard_loss_B.double()) / ahead
    ratio_B = torch.where(ahead > 0, ratio_B.clamp(0.0, 1.0), 0.0)
    return torch.nan_to_num(ratio_B, nan=0.0).pow(power).float()


ENTROPY_BINS = 256


def entropy_histogram(entropy_T: Tensor, counted_T: Tensor, vocab_size: int) -> Tensor:
    """Counts of the counted tokens over ENTROPY_BINS equal bins of [0, log V]; fp64, to be summed over ranks."""
    bins_T = _entropy_bin(entropy_T, vocab_size)
    return torch.bincount(bins_T[counted_T], minlength=ENTROPY_BINS).double()


def entropy_factor(
    entropy_T: Tensor, vocab_size: int, *, scale: bool, skip: float, histogram: Tensor | None = None
) -> Tensor:
    """Per token: 0 for the `skip` share of lowest teacher entropy, else 1, times entropy / log V with `scale`.

    `histogram` is the global batch's (see entropy_histogram), so that the share does not depend on how the batch is cut
    into ranks and micro-batches. The bin in which the share ends is kept whole, so at most `skip` is dropped.

    Source: dropping the lowest 15 %, arXiv 2509.01649; entropy / log V, arXiv 2605.26246.
    """
    factor_T = torch.ones_like(entropy_T)
    if skip > 0.0:
        assert histogram is not None
        below = histogram.cumsum(0) <= skip * histogram.sum()
        first_kept = below.sum()
        factor_T = (_entropy_bin(entropy_T, vocab_size) >= first_kept).to(entropy_T.dtype)
    if scale:
        factor_T = factor_T * (entropy_T / math.log(vocab_size)).clamp(0.0, 1.0)
    return factor_T


def _entropy_bin(entropy_T: Tensor, vocab_size: int) -> Tensor:
    return (entropy_T * (ENTROPY_BINS / math.log(vocab_size))).long().clamp(0, ENTROPY_BINS - 1)
