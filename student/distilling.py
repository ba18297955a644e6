"""The student's recipe: soft and hard loss in one pass, weighted per token by a schedule and factors."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill.config.errors import ConfigError
from distill.config.registry import FACTORS, Options
from distill.config.schema import StudentConfig, WeightingConfig
from distill.data.join import Batch
from distill.engine.dist import Dist
from distill.engine.recipe import Forward, Recipe
from losses import weighting
from losses.schedule import schedule
from losses.weighting import Factor, Mean, Setting, Signals, State, Weighting, Weights
from student.checked_factor import RUN_METRICS, CheckedFactor
from student.live_teacher import LiveTeacher, labelled
from student.soft_loss import SoftLoss

ALPHA_BINS = 20
COVERED = ("soft", "mass", "agreement", "hidden_match")
"""Parts of the loss that are averaged over tokens with targets; the others are averaged over all valid tokens."""
METRIC_NAMES = {"hard": "hard_loss", "soft": "soft_loss"}
"""Of parts of the loss, where they differ from the part's."""


class StepPlan(NamedTuple):
    """What a whole optimizer step decides before its micro-batches run."""

    step: int
    state: dict[str, State]
    """Of the weighting's factors."""


class StudentRecipe(Recipe):
    """The recipe of one student.

    Args:
        steps: of the run.
        teacher_vocab_size: V of the teachers whose entropies are read, the largest where they differ; None: the
            student's.
        best_teacher_loss: nats, of the best shard of each corpus' cache, where the caches are complete.
        corpora: number of corpora.
        loss: None: that of the configuration, on the targets of a codec that draws.
        live: the teacher of live targets.
    """

    def __init__(
        self,
        config: StudentConfig,
        dist: Dist,
        steps: int,
        corpora: int = 1,
        teacher_vocab_size: int | None = None,
        best_teacher_loss: Sequence[float] | None = None,
        loss: SoftLoss | None = None,
        live: LiveTeacher | None = None,
    ):
        self.config, self.dist = config, dist
        best_C = torch.full((corpora,), torch.inf, dtype=torch.float64, device=dist.device)
        if best_teacher_loss is not None:
            best_C = torch.fmin(best_C, best_C.new_tensor(best_teacher_loss))
        vocab_size = config.model.vocab_size
        setting = Setting(vocab_size, teacher_vocab_size or vocab_size, best_C)
        self._plugins = _plugins(config.weighting, setting)
        factors = _factors(config.weighting, setting) | self._plugins
        self.weighting = Weighting(partial(_peak, config.weighting, steps), factors)
        self.weighting_state = self.weighting.init()
        self.covered = torch.zeros(2, dtype=torch.float64, device=dist.device)
        """Valid tokens so far: those with targets, and all."""
        self._corpora = corpora
        self._loss, self._live = loss or SoftLoss(config), live

    def ready(self, batch: Batch, parts: int) -> Batch:
        """The batch with the targets of a live teacher, if there is one."""
        if self._live is None:
            return batch
        return labelled(self._live, batch, parts, self.config.train.head_chunk, self._corpora, self.dist)

    def begin(self, batch: Batch, step: int) -> StepPlan:
        """The factors' view of the whole optimizer step; collective."""
        if batch.targets is None:
            return StepPlan(step, self.weighting_state)
        signals = _signals(batch, batch.valid_BS.device)
        return StepPlan(step, self.weighting.observe(self.weighting_state, signals, self.dist.sum, self.dist.least))

    def weigh(self, micro: Batch, plan: StepPlan) -> Weights:
        assert micro.targets is not None
        signals = _signals(micro, self.dist.device)
        return self.weighting.weigh(plan.state, plan.step, signals, micro.targets.covered_T)

    def forward(self, model: Any, micro: Batch, plan: StepPlan) -> Forward:
        """Sum over valid tokens of soft and hard loss, weighted (nats); the result is the sums that `end` takes."""
        labels_T, valid_T = micro.labels_BS.flatten(), micro.valid_BS.flatten()
        alpha_T, covered_T = torch.zeros(len(valid_T), device=valid_T.device), torch.zeros_like(valid_T)
        target_means: dict[str, Mean] = {}
        histograms: dict[str, Tensor] = {}
        if micro.targets is not None:
            weights = self.weigh(micro, plan)
            alpha_T = weights.alpha_T.to(valid_T.device)
            covered_T = (micro.targets.covered_T & valid_T).to(valid_T.device)
            target_means = _target_means(micro, alpha_T, covered_T) | weights.means
            bins_T = (alpha_T * ALPHA_BINS).long().clamp(0, ALPHA_BINS - 1)
            # index_add_, not bincount: that would wait for the device.
            histograms["alpha"] = alpha_T.new_zeros(ALPHA_BINS).index_add_(0, bins_T, valid_T.float())
        w_soft_T, teacher = alpha_T * valid_T, None
        if self._live is not None and micro.teacher_TE is not None:
            teacher = micro.teacher_TE, self._live.unembedding()
        rows = self._loss.rows(labels_T, (1.0 - alpha_T) * valid_T, micro.targets, w_soft_T, teacher)
        head_fn = partial(self._loss.head, rows=rows, w_soft_T=w_soft_T, teacher_TE=micro.teacher_TE)
        head, routing = model(micro.ids_BS, micro.documents_BS, head_fn, micro.images)
        loss = {"loss": Mean(head.loss_sum.detach(), valid_T.sum())}
        means = loss | _means(head.parts, valid_T, covered_T) | target_means
        result = self._sums(micro, head.parts["hard"], covered_T, valid_T)
        return Forward(head.loss_sum, routing, means, histograms, result)

    def end(self, plan: StepPlan, results: list[Tensor]) -> None:
        """Moves coverage and the factors' state on, by all ranks' sums; collective."""
        sums_C3 = torch.zeros(self._corpora, 3, dtype=torch.float64, device=self.dist.device)
        for part_C3 in results:
            sums_C3 += part_C3
        sums_C3 = self.dist.sum(sums_C3)
        self.covered += sums_C3[:, 1:].sum(0)
        self.weighting_state = self.weighting.update(plan.state, sums_C3[:, 0] / sums_C3[:, 2])

    def metrics(self) -> dict[str, float]:
        """None; ConfigError, on every rank: a factor's value was not in [0, 1] on one of them."""
        if self._plugins:
            mine = [problem for factor in self._plugins.values() if (problem := factor.problem()) is not None]
            if problems := dict.fromkeys(chain.from_iterable(self.dist.gather(mine))):
                raise ConfigError(*problems)
        return {}

    @property
    def coverage(self) -> float:
        """Share of the valid tokens so far that had targets."""
        return float(self.covered[0] / self.covered[1].clamp(min=1))

    def state(self) -> dict[str, Any]:
        state = {"weighting": weighting.to_json(self.weighting_state), "covered": self.covered.tolist()}
        return state if self._identity is None else state | {"teacher": self._identity}

    @property
    def _identity(self) -> str | None:
        """Of a frozen live teacher."""
        return None if self._live is None else self._live.identity

    def load_state(self, state: dict[str, Any]) -> None:
        """ConfigError: the live teacher is another one than before."""
        if (before := state.get("teacher")) != self._identity:
            raise ConfigError(f"teacher.from has weights {self._identity}; the run was started with {before}")
        self.weighting_state = weighting.from_json(state["weighting"], self.weighting_state)
        self.covered = self.covered.new_tensor(state["covered"])

    def _sums(self, micro: Batch, hard_T: Tensor, covered_T: Tensor, valid_T: Tensor) -> Tensor:
        """Of each corpus: hard loss, tokens with targets, valid tokens; fp64 [C, 3]."""
        corpus_B = torch.as_tensor(micro.corpus_B).to(valid_T.device, non_blocking=True)
        corpus_T = corpus_B.repeat_interleave(micro.ids_BS.shape[1])
        rows = []
        for corpus in range(self._corpora):
            mine_T = valid_T & (corpus_T == corpus)
            sums = (hard_T * mine_T).sum(), (covered_T & mine_T).sum(), mine_T.sum()
            rows.append(torch.stack([part.double() for part in sums]))
        return torch.stack(rows)


def _peak(config: WeightingConfig, steps: int, step: int) -> float:
    """The largest alpha of a step; only wsd has a warm-up."""
    kind = config.schedule.value
    warmup, decay = (config.warmup * steps if kind == "wsd" else 0.0), config.decay * steps
    return schedule(kind, step, steps, peak=config.alpha, final=config.final_alpha, warmup=warmup, decay=decay)


def _factors(config: WeightingConfig, setting: Setting) -> dict[str, Factor]:
    """Those of the project's own factors that are switched on, by name, in the order of their product."""
    options = {name: part for name in ("lag", "entropy") if (part := getattr(config, name)).enabled}
    return {name: FACTORS[name](setting, part) for name, part in options.items()}


def _plugins(config: WeightingConfig, setting: Setting) -> dict[str, CheckedFactor]:
    """The factors of the user's modules, by name, in the order of their product."""
    owners = dict.fromkeys(RUN_METRICS, "the run itself")
    factors = {}
    for name, options in config.plugins.items():
        key = f"student.weighting.plugins.{name}"
        factors[name] = CheckedFactor(key, FACTORS[name](setting, Options(key, options)), owners)
    return factors


def _signals(batch: Batch, device: torch.device) -> Signals:
    assert batch.targets is not None
    covered_T = batch.targets.covered_T & batch.valid_BS.flatten()
    corpus_B = torch.as_tensor(batch.corpus_B).to(device, non_blocking=True)
    return Signals(corpus_B, batch.shard_loss_B, batch.targets.entropy_T, covered_T)


def _means(parts: Mapping[str, Tensor], valid_T: Tensor, covered_T: Tensor) -> dict[str, Mean]:
    """Metrics of the loss' parts, each over the tokens that it is defined on."""
    tokens_T = {name: covered_T if name in COVERED else valid_T for name in parts}
    return {
        METRIC_NAMES.get(name, name): Mean((part_T * tokens_T[name]).sum(), tokens_T[name].sum())
        for name, part_T in parts.items()
    }


def _target_means(micro: Batch, alpha_T: Tensor, covered_T: Tensor) -> dict[str, Mean]:
    """Metrics of the targets and their weights."""
    valid_T = micro.valid_BS.flatten()
    covered_B = ~micro.shard_loss_B.isnan()
    return {
        "alpha": Mean((alpha_T * valid_T).sum(), valid_T.sum()),
        "coverage": Mean(covered_T.sum(), valid_T.sum()),
        "teacher_loss": Mean(torch.nan_to_num(micro.shard_loss_B).sum(), covered_B.sum()),
    }
