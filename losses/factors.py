"""The factors of alpha that ship with the project; see `losses.weighting.Factor`."""

import math
from typing import Any

import torch
from torch import Tensor

from losses.weighting import Collective, Mean, Setting, Signals, State

ENTROPY_BINS = 256


class Lag:
    """clip((student - shard) / (student - best), 0, 1) ** power, where the losses are of the sample's corpus.

    1 where the targets come from the best teacher read so far, 0 where the teacher that made them was no better than
    the student is now, or where a sample has no targets. A student ahead of every teacher gives 0.

    Its state, fp64 [C] in nats, one number a corpus, since losses of different corpora cannot be compared:
    `student_loss`, running average of the student's hard loss, at first that of a uniform distribution, log V;
    `best_teacher_loss`, least mean loss of a shard read so far. "Read", not "published": the state is then a function
    of the student's own position, and a run that follows a live teacher weighs alike however the two are timed, killed
    or resumed.

    Source: ours. Motivated by arXiv 2410.16215, where early logits of a learning teacher harm at a constant weight.
    """

    def __init__(self, setting: Setting, options: Any):
        """options: `power`, and `smoothing`, decay of the running average a step."""
        self.setting, self.power, self.smoothing = setting, options.power, options.smoothing

    def init(self) -> State:
        best_C = self.setting.best_teacher_loss_C
        return {"student_loss": torch.full_like(best_C, math.log(self.setting.vocab_size)), "best_teacher_loss": best_C}

    def observe(self, state: State, signals: Signals, total: Collective, least: Collective) -> State:
        best_C = state["best_teacher_loss"]
        loss_B = torch.nan_to_num(signals.shard_loss_B.double(), nan=math.inf)
        least_C = torch.full(best_C.shape, math.inf, dtype=torch.float64, device=loss_B.device)
        least_C.scatter_reduce_(0, signals.corpus_B, loss_B, "amin")
        return state | {"best_teacher_loss": torch.fmin(best_C, least(least_C.to(best_C.device)))}

    def value(self, state: State, signals: Signals) -> Tensor:
        student_B, best_B = (state[name][signals.corpus_B] for name in ("student_loss", "best_teacher_loss"))
        ahead_B = student_B - best_B
        ratio_B = (student_B - signals.shard_loss_B.double()) / ahead_B
        ratio_B = torch.where(ahead_B > 0, ratio_B.clamp(0.0, 1.0), 0.0)
        factor_B = torch.nan_to_num(ratio_B, nan=0.0).pow(self.power).float()
        return factor_B.repeat_interleave(len(signals.entropy_T) // len(factor_B))

    def update(self, state: State, hard_loss_C: Tensor) -> State:
        before_C = state["student_loss"]
        moved_C = self.smoothing * before_C + (1.0 - self.smoothing) * hard_loss_C
        return state | {"student_loss": torch.where(moved_C.isnan(), before_C, moved_C)}

    def metrics(self, state: State, signals: Signals, value_T: Tensor) -> dict[str, Mean]:
        """`lag`, nats by which the teacher of a sample's targets was worse than the best; `lag_factor`, its value."""
        covered_B = ~signals.shard_loss_B.isnan()
        loss_B = torch.nan_to_num(signals.shard_loss_B)
        lag_B = torch.where(covered_B, loss_B - state["best_teacher_loss"][signals.corpus_B].float(), 0.0)
        factor_B = value_T.view(len(loss_B), -1)[:, 0]
        return {
            "lag_factor": Mean(factor_B.sum(), covered_B.sum()),
            "lag": Mean(lag_B.sum(), covered_B.sum()),
            "student_loss": Mean(state["student_loss"].mean(), 1.0),
        }


class Entropy:
    """0 for the `skip` share of a step's tokens that are lowest in teacher entropy, else 1; times entropy / log V with
    `scale`.

    The share is that of the whole step over all ranks, so it does not depend on how a batch is cut. The bin of
    [0, log V] in which it ends is kept whole, so at most `skip` is dropped. Its state is the first bin that is kept.

    Source: dropping the lowest 15 %, arXiv 2509.01649; entropy / log V, arXiv 2605.26246.
    """

    def __init__(self, setting: Setting, options: Any):
        self.most, self.scale, self.skip = math.log(setting.teacher_vocab_size), options.scale, options.skip
        self._device = setting.best_teacher_loss_C.device

    def init(self) -> State:
        return {"first_kept": torch.zeros(1, dtype=torch.int64, device=self._device)} if self.skip else {}

    def observe(self, state: State, signals: Signals, total: Collective, least: Collective) -> State:
        if not self.skip:
            return state
        bins_T = self._bin(signals.entropy_T)[signals.covered_T]
        counts = total(torch.bincount(bins_T, minlength=ENTROPY_BINS).double().to(self._device))
        return {"first_kept": (counts.cumsum(0) <= self.skip * counts.sum()).sum()[None]}

    def value(self, state: State, signals: Signals) -> Tensor:
        entropy_T = signals.entropy_T
        factor_T = torch.ones_like(entropy_T)
        if self.skip:
            factor_T = (self._bin(entropy_T) >= state["first_kept"]).to(entropy_T.dtype)
        if self.scale:
            factor_T = factor_T * (entropy_T / self.most).clamp(0.0, 1.0)
        return factor_T

    def update(self, state: State, hard_loss_C: Tensor) -> State:
        return state

    def metrics(self, state: State, signals: Signals, value_T: Tensor) -> dict[str, Mean]:
        """`entropy_factor`, its mean over covered tokens."""
        return {"entropy_factor": Mean((value_T * signals.covered_T).sum(), signals.covered_T.sum())}

    def _bin(self, entropy_T: Tensor) -> Tensor:
        return (entropy_T * (ENTROPY_BINS / self.most)).long().clamp(0, ENTROPY_BINS - 1)
