"""One training step of the student: soft and hard loss in one pass, weighed per token by schedule, lag and entropy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distill.config.schema import WeightingConfig
from distill.data.join import Batch
from distill.engine.dist import Dist
from distill.model.transformer import Routing
from distill.tracking.meters import Meters
from losses import mixed_loss, weighting

ALPHA_BINS = 20


class StudentStep:
    """The student's half of the training loop's protocol: `begin`, `loss` per micro-batch, `end`, `state`."""

    def __init__(
        self,
        meters: Meters,
        head_chunk: int,
        config: WeightingConfig,
        vocab_size: int,
        steps: int,
        corpora: int = 1,
        teacher_vocab_size: int | None = None,
    ):
        """
        Args:
            vocab_size: V of the student.
            teacher_vocab_size: V of the teachers whose entropies are read, the largest where they differ; None: the
                student's.
        """
        assert meters.device is not None, "the state of the weighting lives where the meters do"
        self.meters, self.head_chunk, self.config = meters, head_chunk, config
        self.steps = steps
        self.teacher_vocab_size = teacher_vocab_size or vocab_size
        self.lag = weighting.init_lag(vocab_size, meters.device, corpora)
        self.covered = torch.zeros(2, dtype=torch.float64, device=meters.device)
        """Valid tokens met so far: those with targets, and all."""

    def know_best(self, teacher_loss: Sequence[float]) -> None:
        """Tells the weighting the best teacher of each complete cache, before the first step."""
        self.lag = weighting.meet(self.lag, self.covered.new_tensor(teacher_loss))

    def begin(self, batch: Batch, step: int, dist: Dist) -> None:
        """Takes note of the whole optimizer step's targets on this rank; collective where a factor needs all ranks."""
        config = self.config
        # Of this optimizer step on this rank and each corpus: hard loss, tokens with targets, valid tokens.
        self._sums_C3 = torch.zeros(len(self.lag.student_loss), 3, dtype=torch.float64, device=dist.device)
        self._peak = weighting.schedule(
            config.schedule.value,
            step / self.steps,
            peak=config.alpha,
            final=config.final_alpha,
            warmup=config.warmup,
            decay=config.decay,
        )
        self._histogram = None
        if batch.targets is None:
            return
        if config.lag.enabled:
            losses_B = torch.nan_to_num(batch.shard_loss_B.double(), nan=math.inf)
            least_C = torch.full(self.lag.student_loss.shape, math.inf, dtype=torch.float64)
            least_C.scatter_reduce_(0, torch.as_tensor(batch.corpus_B), losses_B, "amin")
            self.lag = weighting.meet(self.lag, dist.least(least_C.to(dist.device)))
        if config.entropy.enabled and config.entropy.skip > 0:
            covered_T = batch.targets.covered_T & batch.valid_BS.flatten()
            counts = weighting.entropy_histogram(batch.targets.entropy_T, covered_T, self.teacher_vocab_size)
            self._histogram = dist.sum(counts.to(dist.device))

    def weigh(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """alpha_T, zero where a token has no targets, and the lag factor per sample (nan: no targets)."""
        assert batch.targets is not None
        config, length = self.config, batch.ids_BS.shape[1]
        alpha_T = self._peak * batch.targets.covered_T.float()
        lag_B = torch.where(batch.shard_loss_B.isnan(), torch.nan, 1.0)
        if config.lag.enabled:
            factor_B = weighting.lag_factor(batch.shard_loss_B, self._lag_of(batch), config.lag.power)
            lag_B = torch.where(batch.shard_loss_B.isnan(), torch.nan, factor_B)
        alpha_T = alpha_T * torch.nan_to_num(lag_B, nan=0.0).repeat_interleave(length)
        if config.entropy.enabled:
            alpha_T = alpha_T * weighting.entropy_factor(
                batch.targets.entropy_T,
                self.teacher_vocab_size,
                scale=config.entropy.scale,
                skip=config.entropy.skip,
                histogram=self._histogram,
            )
        return alpha_T, lag_B

    def _lag_of(self, batch: Batch) -> weighting.LagState:
        """The state of each sample's corpus."""
        corpus_B = self._corpus(batch)
        return weighting.LagState(*(part[corpus_B] for part in self.lag))

    def _corpus(self, batch: Batch) -> Tensor:
        return torch.as_tensor(batch.corpus_B).to(self.covered.device, non_blocking=True)

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, Routing]:
        """Sum over valid tokens of soft and hard loss, weighted (nats), and what the routers did."""
        labels_T, valid_T = batch.labels_BS.flatten(), batch.valid_BS.flatten()
        alpha_T, ids_TK, probs_TK, w_soft_T = torch.zeros(len(valid_T), device=valid_T.device), None, None, None
        if batch.targets is not None:
            alpha_T, lag_B = self.weigh(batch)
            alpha_T = alpha_T.to(valid_T.device)
            ids_TK, probs_TK = batch.targets.ids_TK, batch.targets.probs_TK
            w_soft_T = alpha_T * valid_T
        w_hard_T = (1.0 - alpha_T) * valid_T
        parts = []

        def head(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
            parts.append(
                mixed_loss(hidden_TD, weight_VD, labels_T, w_hard_T, ids_TK, probs_TK, w_soft_T, chunk=self.head_chunk)
            )
            return parts[0].loss_sum

        loss_sum, routing = model(batch.ids_BS, batch.documents_BS, head, batch.images)
        out, num_valid = parts[0], valid_T.sum()
        covered_T = torch.zeros_like(valid_T)
        add = self.meters.add
        add("loss", loss_sum.detach(), num_valid)
        add("hard_loss", (out.hard_T * valid_T).sum(), num_valid)
        if batch.targets is not None:
            covered_T = (batch.targets.covered_T & valid_T).to(out.hard_T.device)
            num_covered = covered_T.sum()
            add("soft_loss", (out.soft_T * covered_T).sum(), num_covered)
            add("mass", (out.mass_T * covered_T).sum(), num_covered)
            add("agreement", (out.agree_T & covered_T).sum(), num_covered)
            add("alpha", (alpha_T * valid_T).sum(), num_valid)
            add("coverage", num_covered, num_valid)
            met_B = ~lag_B.isnan()
            shard_loss_B = torch.nan_to_num(batch.shard_loss_B)
            add("lag_factor", torch.nan_to_num(lag_B).sum(), met_B.sum())
            add("teacher_loss", shard_loss_B.sum(), met_B.sum())
            if self.config.lag.enabled:
                best_B = self._lag_of(batch).best_teacher_loss.float()
                add("lag", torch.where(met_B, shard_loss_B - best_B, 0.0).sum(), met_B.sum())
                add("student_loss", self.lag.student_loss.mean(), 1.0)
            bins_T = (alpha_T * ALPHA_BINS).long().clamp(0, ALPHA_BINS - 1)
            # index_add_, not bincount: that would wait for the device.
            self.meters.histogram("alpha", alpha_T.new_zeros(ALPHA_BINS).index_add_(0, bins_T, valid_T.float()))
        corpus_T = self._corpus(batch).repeat_interleave(batch.ids_BS.shape[1])
        for corpus, sums_3 in enumerate(self._sums_C3):
            mine_T = valid_T & (corpus_T == corpus)
            sums = (out.hard_T * mine_T).sum(), (covered_T & mine_T).sum(), mine_T.sum()
            sums_3 += torch.stack([part.double() for part in sums])
        return loss_sum, routing

    def end(self, dist: Dist) -> None:
        """Lets coverage and the running average of the student's own loss follow; collective."""
        sums_C3 = dist.sum(self._sums_C3)
        self.covered += sums_C3[:, 1:].sum(0)
        self.lag = weighting.update_lag(self.lag, sums_C3[:, 0] / sums_C3[:, 2], self.config.lag.smoothing)

    def figures(self) -> dict[str, float]:
        return {}

    @property
    def coverage(self) -> float:
        """Share of the valid tokens met so far that had targets."""
        return float(self.covered[0] / self.covered[1].clamp(min=1))

    def state(self) -> dict[str, Any]:
        """The weighting's state as JSON-able numbers, exact."""
        lag = [[None if math.isinf(x) else x for x in part.tolist()] for part in self.lag]
        return {"lag": lag, "covered": self.covered.tolist()}

    def load_state(self, state: dict[str, Any]) -> None:
        values = [[math.inf if x is None else x for x in part] for part in state["lag"]]
        self.lag = weighting.LagState(*(self.covered.new_tensor(x) for x in values))
        self.covered = self.covered.new_tensor(state["covered"])

    def hand_over(self) -> dict[str, Tensor]:
        return {}

    def take_back(self, tensors: dict[str, Tensor]) -> None:
        assert not tensors, list(tensors)
