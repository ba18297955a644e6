"""The factors of alpha that ship with the project; see `losses.weighting.Factor`."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from losses.weighting import Collective, Mean, Setting, Signals, State

ENTROPY_BINS = 256
LEAST = 1e-6
"""Tokens of which a place on a curve is left at least."""


class Stateless:
    """A factor that is a function of a token's signals alone."""

    reads_label = False

    def init(self) -> State:
        return {}

    def observe(self, state: State, signals: Signals, total: Collective) -> State:
        return state

    def sums(self, state: State, signals: Signals) -> Tensor:
        return signals.entropy_T.new_zeros(0, dtype=torch.float64)

    def update(self, state: State, sums: Tensor) -> State:
        return state

    def metrics(self, state: State, signals: Signals, value_T: Tensor) -> Mapping[str, Mean]:
        return {}


class Lag(Stateless):
    """clip((student - teacher) / (student - end), 0, 1) ** power, where losses are on the teacher's smooth curve.

    1 where the targets are as good as the best teacher's will be, or better, as those of a teacher that diverged later;
    0 where the teacher that made them was no better than the student is now, or where a sample has no targets. A
    student ahead of every teacher gives 0.

    The student counts as no worse than its teacher was after as many tokens (par): labels alone give that much. Without
    this bound a student that reads targets in the teacher's own order stays as far behind as its targets hold it, which
    keeps their weight up: on a made-up language that cost 0.03 nats (LOG.md, 2026-11-27).

    Student and teacher are compared on the same tokens: the student's place on the teacher's curve is the mean, over
    the tokens that it saw last, of its loss less the teacher's loss of the same labels plus the teacher's level at that
    step. So neither easy text nor how the cache is cut moves it, and it counts tokens, not steps. Its state, fp64
    [C, 2], by corpus, since losses of different corpora cannot be compared: sums of that and of tokens, in which a
    token's share fades with the tokens after it.

    Source: ours. Motivated by arXiv 2410.16215, where early logits of a learning teacher harm at a constant weight.
    """

    def __init__(self, setting: Setting, options: Any):
        """options: `power`, and `memory`, the share of the run's tokens after which a token counts 1 / e."""
        self.setting, self.power, self.memory = setting, options.power, options.memory

    def init(self) -> State:
        return {"place": torch.zeros(self.setting.corpora, 2, dtype=torch.float64, device=self.setting.device)}

    def value(self, state: State, signals: Signals) -> Tensor:
        student_T = torch.minimum(self._place(state)[signals.corpus_T], signals.par_T.double())
        ahead_T = student_T - torch.minimum(signals.end_T, signals.level_T).double()
        ratio_T = (student_T - signals.level_T.double()) / ahead_T
        ratio_T = torch.where(ahead_T > 0, ratio_T.clamp(0.0, 1.0), 0.0)
        return torch.nan_to_num(ratio_T, nan=0.0).pow(self.power).float()

    def _place(self, state: State) -> Tensor:
        """The student's loss on each corpus' teachers' curve; that of a uniform distribution before any token."""
        sum_C, tokens_C = state["place"].unbind(1)
        return torch.where(tokens_C > 0, sum_C / tokens_C.clamp(min=LEAST), math.log(self.setting.vocab_size))

    def sums(self, state: State, signals: Signals) -> Tensor:
        known_T = signals.covered_T & ~signals.level_T.isnan()
        place_T = (signals.student_loss_T - signals.teacher_loss_T + signals.level_T).double()
        sums_C2 = torch.zeros_like(state["place"])
        both_T2 = torch.stack([torch.where(known_T, place_T, 0.0), known_T.double()], dim=1)
        return sums_C2.index_add_(0, signals.corpus_T, both_T2.to(sums_C2.device))

    def update(self, state: State, sums: Tensor) -> State:
        fade = torch.exp(-sums[:, 1].sum() / (self.memory * self.setting.tokens))
        # Not to nothing: a corpus that is rare, or has long had no targets, keeps its place.
        fade_C1 = torch.maximum(fade, LEAST / state["place"][:, 1:]).clamp(max=1.0)
        return {"place": state["place"] * fade_C1 + sums}

    def metrics(self, state: State, signals: Signals, value_T: Tensor) -> dict[str, Mean]:
        """`student_place`, nats: where the student is on the teachers' curves, mean over corpora."""
        return {"student_place": Mean(self._place(state).mean(), 1.0)}


class Entropy(Stateless):
    """0 for the `skip` share of a step's tokens that are lowest in teacher entropy, else 1; times entropy / log V with
    `scale`.

    The share is that of the whole step over all ranks, so it does not depend on how a batch is cut. The bin of
    [0, log V] in which it ends is kept whole, so at most `skip` is dropped. Its state is the first bin that is kept.

    Source: dropping the lowest 15 %, arXiv 2509.01649; entropy / log V, arXiv 2605.26246.
    """

    def __init__(self, setting: Setting, options: Any):
        self.most, self.scale, self.skip = math.log(setting.teacher_vocab_size), options.scale, options.skip
        self._device = setting.device

    def init(self) -> State:
        return {"first_kept": torch.zeros(1, dtype=torch.int64, device=self._device)} if self.skip else {}

    def observe(self, state: State, signals: Signals, total: Collective) -> State:
        if not self.skip:
            return state
        # Not a mask and bincount: these wait for the device.
        counts = torch.zeros(ENTROPY_BINS, dtype=torch.float64, device=self._device)
        counts = total(counts.index_add_(0, self._bin(signals.entropy_T), signals.covered_T.double()))
        return {"first_kept": (counts.cumsum(0) <= self.skip * counts.sum()).sum()[None]}

    def value(self, state: State, signals: Signals) -> Tensor:
        entropy_T = signals.entropy_T
        factor_T = torch.ones_like(entropy_T)
        if self.skip:
            factor_T = (self._bin(entropy_T) >= state["first_kept"]).to(entropy_T.dtype)
        if self.scale:
            factor_T = factor_T * (entropy_T / self.most).clamp(0.0, 1.0)
        return factor_T

    def _bin(self, entropy_T: Tensor) -> Tensor:
        return (entropy_T * (ENTROPY_BINS / self.most)).long().clamp(0, ENTROPY_BINS - 1)


class Disagreement(Stateless):
    """d / (d + half), d the divergence of the token's soft loss: tokens on which both agree need no soft loss.

    Where targets are drawn, the divergence is an unbiased estimate with the noise of the draws; below 0 it counts as 0.

    Source: weights that grow with the divergence, AdaKD (arXiv 2510.11615); the bounded form is ours.
    """

    def __init__(self, setting: Setting, options: Any):
        """options: `half`, nats at which the factor is one half."""
        self.half = options.half

    def value(self, state: State, signals: Signals) -> Tensor:
        above_T = signals.disagreement_T.clamp(min=0.0)
        return above_T / (above_T + self.half)


class Variance(Stateless):
    """1 / (1 + 1 / draws + n B / V): the weight that makes the mixed target's expected squared error least.

    V, variance of a one-hot label of the token, 1 - sum p^2, taken as 1 - exp(-entropy), an upper bound by Jensen's
    inequality that is exact for a uniform p; B, squared bias of the target, taken as the teacher's lag in nats; n,
    labels that the student averages, which grows as the learning rate falls: `labels` x peak rate / rate.

    Source: reference of the project, *VOW* (bias-variance of a mix of n hard labels with a biased soft target).
    """

    def __init__(self, setting: Setting, options: Any):
        """options: `labels`, n at the peak of the learning rate."""
        self.labels, self.draws = options.labels, setting.draws

    def value(self, state: State, signals: Signals) -> Tensor:
        n = self.labels / max(signals.lr_share, 1e-6)
        bias_T = (signals.level_T - signals.end_T).clamp(min=0.0)
        variance_T = -torch.expm1(-signals.entropy_T)
        value_T = variance_T / (variance_T * (1.0 + 1.0 / self.draws) + n * bias_T)
        return torch.nan_to_num(value_T, nan=0.0, posinf=0.0).clamp(0.0, 1.0)


class LabelGap(Stateless):
    """Sigmoid of (student's loss - teacher's loss of the same label - margin) / width: soft targets count where the
    teacher was better on this very token.

    It looks at the label, so it scales the soft term alone.

    Source: ours; gates by whether the teacher is right are common, but cut at an argmax that is often wrong.
    """

    reads_label = True

    def __init__(self, setting: Setting, options: Any):
        """options: `margin` and `width`, nats."""
        self.margin, self.width = options.margin, options.width

    def value(self, state: State, signals: Signals) -> Tensor:
        gap_T = signals.student_loss_T - signals.teacher_loss_T
        return torch.sigmoid((gap_T - self.margin) / self.width)
