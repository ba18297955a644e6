"""The weights of a micro-batch, made while its logits exist, and what is logged of them."""

from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from distill.config.errors import ConfigError
from distill.data.join import Batch
from distill.model.transfer import sent
from losses.rows import weighted
from losses.weighting import Mean, Signals, State, Weighting

BINS = 20
"""Of a histogram over [0, 1]."""


def signals_of(batch: Batch, device: torch.device, lr_share: float) -> Signals:
    """What factors read of a batch with targets, but for what the student predicts."""
    assert batch.targets is not None
    targets = batch.targets
    columns = targets.covered_T, targets.label_logprob_T, targets.entropy_T
    covered_T, label_logprob_T, entropy_T = (sent(column, device) for column in columns)
    length, none = batch.ids_BS.shape[1], entropy_T.new_empty(0)

    def tokens(part_B: Tensor) -> Tensor:
        return sent(part_B, device).repeat_interleave(length)

    return Signals(
        corpus_T=tokens(torch.as_tensor(batch.corpus_B)),
        covered_T=covered_T & sent(batch.valid_BS, device).flatten(),
        entropy_T=entropy_T,
        teacher_loss_T=-label_logprob_T,
        level_T=tokens(batch.level_B),
        end_T=tokens(batch.end_B),
        par_T=tokens(batch.par_B),
        shard_loss_T=tokens(batch.shard_loss_B),
        lr_share=lr_share,
        student_loss_T=none,
        disagreement_T=none,
    )


class Weighed(NamedTuple):
    """The weights of T tokens."""

    signals: Signals
    valid_T: Tensor
    hard_T: Tensor
    soft_T: Tensor
    values: dict[str, Tensor]
    """[T] of each factor."""

    def means(self, parts: Mapping[str, Tensor]) -> dict[str, Mean]:
        """Metrics of targets and weights; parts: of the loss.

        On the same tokens: `teacher_lead`, nats by which the teacher's loss was below the student's, and
        `disagreement`, by how much the soft loss is above the least it can be. `lag`, nats by which the teacher was
        worse than where the best one ends; `effective_weight`, the soft term's share of the norms of both terms'
        gradients at the logits.
        """
        signals, covered_T = self.signals, self.signals.covered_T
        tokens, valid = covered_T.sum(), self.valid_T.sum()

        def mean(part_T: Tensor) -> Mean:
            return Mean(torch.where(covered_T, part_T, 0.0).sum(), tokens)

        means = {
            "alpha": Mean(self.soft_T.sum(), valid),
            "coverage": Mean(tokens, valid),
            "teacher_loss": mean(signals.teacher_loss_T),
            "teacher_lead": mean(signals.student_loss_T - signals.teacher_loss_T),
            "disagreement": mean(signals.disagreement_T),
            "lag": mean(torch.nan_to_num(signals.level_T - signals.end_T)),
        }
        if "soft_norm" in parts:
            soft = weighted(self.soft_T, parts["soft_norm"]).sum()
            hard = weighted(self.hard_T, parts["hard_norm"]).sum()
            means["effective_weight"] = Mean(soft, soft + hard)
        return means

    def histograms(self) -> dict[str, Tensor]:
        """Counts of equal bins over [0, 1], of alpha over valid tokens and of each factor over tokens with targets."""
        counted = {"alpha": (self.soft_T, self.valid_T)}
        counted |= {f"{name}_factor": (value_T, self.signals.covered_T) for name, value_T in self.values.items()}
        histograms = {}
        for name, (value_T, tokens_T) in counted.items():
            bins_T = (value_T * BINS).long().clamp(0, BINS - 1)
            # index_add_, not bincount: that would wait for the device.
            histograms[name] = value_T.new_zeros(BINS).index_add_(0, bins_T, tokens_T.float())
        return histograms


class Weigher:
    """Weighs tokens for a row function (`losses.mixed.Weigh`), chunk after chunk, and keeps what became of them.

    Args:
        least_T: the least that each token's soft loss can be, nats.
    """

    def __init__(
        self,
        weighting: Weighting,
        state: dict[str, State],
        step: int,
        signals: Signals,
        valid_T: Tensor,
        least_T: Tensor,
    ):
        self._weighting, self._state, self._step = weighting, state, step
        self.signals, self._valid_T, self._least_T = signals, valid_T, least_T
        self._chunks: list[Weighed] = []

    def __call__(self, rows: slice, hard_t: Tensor, soft_t: Tensor | None) -> tuple[Tensor, Tensor]:
        if soft_t is None:
            raise ConfigError("student.loss gives weigh no soft loss where there are targets; its row function has to")
        signals, valid_t = self.signals.rows(rows), self._valid_T[rows]
        disagreement_t = (soft_t - self._least_T[rows]).float()
        signals = signals._replace(student_loss_T=hard_t.float(), disagreement_T=disagreement_t)
        weights = self._weighting.weigh(self._state, self._step, signals)
        # Not a product: factors may make NaN of what an invalid token holds.
        hard_t, soft_t = (torch.where(valid_t, w_t, 0.0) for w_t in (weights.hard_t, weights.soft_t))
        weighed = Weighed(signals, valid_t, hard_t, soft_t, weights.values)
        self._chunks.append(weighed)
        return weighed.hard_T, weighed.soft_T

    @cached_property
    def whole(self) -> Weighed:
        """Of all tokens; asked for after the head's pass."""
        signals, _, hard, soft, values = zip(*self._chunks)
        seen = self.signals._replace(
            student_loss_T=torch.cat([part.student_loss_T for part in signals]),
            disagreement_T=torch.cat([part.disagreement_T for part in signals]),
        )
        whole = {name: torch.cat([part[name] for part in values]) for name in self._weighting.factors}
        return Weighed(seen, self._valid_T, torch.cat(hard), torch.cat(soft), whole)
