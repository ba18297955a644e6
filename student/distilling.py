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
from distill.engine.optim import learning_rate
from distill.engine.recipe import Forward, Recipe
from distill.model.transfer import sent
from losses import fixed, weighting
from losses.schedule import schedule
from losses.weighting import Factor, Mean, Setting, State, Weighting
from student.checked_factor import RUN_METRICS, CheckedFactor
from student.live_teacher import LiveTeacher, labelled
from student.soft_loss import SoftLoss
from student.weigher import Weigher, signals_of

COVERED = ("soft", "mass", "agreement", "soft_norm", "hidden_match")
"""Parts of the loss that are averaged over tokens with targets; the others are averaged over all valid tokens."""
METRIC_NAMES = {"hard": "hard_loss", "soft": "soft_loss", "hard_norm": "hard_grad_norm", "soft_norm": "soft_grad_norm"}
"""Of parts of the loss, where they differ from the part's."""


class StepPlan(NamedTuple):
    """What a whole optimizer step decides before its micro-batches run."""

    step: int
    state: dict[str, State]
    """Of the weighting's factors."""
    lr_share: float
    """The step's learning rate as a share of its peak."""
    norms: bool
    """Norms of the gradients are measured."""


class MicroSums(NamedTuple):
    """What the end of a step needs of a micro-batch."""

    factors: dict[str, Tensor]
    tokens_2: Tensor
    """fp64: valid tokens with targets, valid tokens."""


class StudentRecipe(Recipe):
    """The recipe of one student.

    Args:
        setting: of the weighting.
        steps: of the run.
        corpora: names of the corpora.
        loss: None: that of the configuration, on the targets of a codec that draws.
        live: the teacher of live targets.
    """

    def __init__(
        self,
        config: StudentConfig,
        dist: Dist,
        setting: Setting,
        steps: int,
        corpora: Sequence[str] = ("main",),
        loss: SoftLoss | None = None,
        live: LiveTeacher | None = None,
    ):
        self.config, self.dist, self.steps, self.corpora = config, dist, steps, corpora
        self._plugins = _plugins(config.weighting, setting)
        factors = _factors(config.weighting, setting) | self._plugins
        self.weighting = Weighting(partial(_peak, config.weighting, steps), factors)
        self.weighting_state = self.weighting.init()
        self.covered = torch.zeros(2, dtype=torch.float64, device=dist.device)
        """Valid tokens so far: those with targets, and all."""
        self._loss, self._live = loss or SoftLoss(config), live

    def ready(self, batch: Batch, parts: int) -> Batch:
        """The batch with the targets of a live teacher, if there is one."""
        if self._live is None:
            return batch
        return labelled(self._live, batch, parts, self.config.train.head_chunk, self.dist)

    def begin(self, batch: Batch, step: int) -> StepPlan:
        """The factors' view of the whole optimizer step; collective."""
        lr_share = learning_rate(self.config.optim, step, self.steps) / self.config.optim.lr
        state = self.weighting_state
        if batch.targets is not None:
            signals = signals_of(batch, self.dist.device, lr_share)
            state = self.weighting.observe(state, signals, self.dist.sum)
        return StepPlan(step, state, lr_share, (step + 1) % self.config.train.log_every == 0)

    def forward(self, model: Any, micro: Batch, plan: StepPlan) -> Forward:
        """Sum over valid tokens of soft and hard loss, weighted (nats); the result is the sums that `end` takes."""
        labels_T, valid_T = micro.labels_BS.flatten(), micro.valid_BS.flatten()
        weigher, teacher = None, None
        if micro.targets is not None:
            signals = signals_of(micro, valid_T.device, plan.lr_share)
            least_T = self._loss.least(micro.targets)
            weigher = Weigher(self.weighting, plan.state, plan.step, signals, valid_T, least_T)
        if self._live is not None and micro.teacher_TE is not None:
            teacher = micro.teacher_TE, self._live.unembedding()
        rows = self._loss.rows(labels_T, weigher or fixed(valid_T.float()), micro.targets, teacher, plan.norms)
        head_fn = partial(self._loss.head, rows=rows, weigher=weigher, teacher_TE=micro.teacher_TE)
        head, routing = model(micro.ids_BS, micro.documents_BS, head_fn, micro.images)
        means = {"loss": Mean(head.loss_sum.detach(), valid_T.sum())}
        histograms: dict[str, Tensor] = {}
        sums, covered_T = dict[str, Tensor](), torch.zeros_like(valid_T)
        corpus_B = sent(torch.as_tensor(micro.corpus_B), valid_T.device)
        per_corpus = {"hard_loss": head.parts["hard"]}
        if weigher is not None:
            covered_T = weigher.signals.covered_T
            weighed = weigher.whole
            means |= weighed.means(head.parts)
            means |= self.weighting.metrics(plan.state, weighed.signals, weighed.values)
            histograms = weighed.histograms()
            sums = self.weighting.sums(plan.state, weighed.signals)
            per_corpus["alpha"] = weighed.soft_T
        means |= _means(head.parts, valid_T, covered_T) | self._by_corpus(per_corpus, corpus_B, valid_T)
        tokens_2 = torch.stack([covered_T.sum(), valid_T.sum()]).double()
        return Forward(head.loss_sum, routing, means, histograms, MicroSums(sums, tokens_2))

    def end(self, plan: StepPlan, results: list[MicroSums]) -> None:
        """Moves coverage and the factors' state on, by all ranks' sums; collective."""
        names = list(results[0].factors)
        parts = [torch.stack([part.factors[name] for part in results]).sum(0) for name in names]
        parts.append(torch.stack([part.tokens_2 for part in results]).sum(0))
        total = self.dist.sum(torch.cat([part.flatten() for part in parts]))
        *moved, tokens_2 = (flat.view_as(part) for flat, part in zip(total.split([p.numel() for p in parts]), parts))
        self.covered += tokens_2
        self.weighting_state = self.weighting.update(plan.state, dict(zip(names, moved))) if names else plan.state

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

    def _by_corpus(self, parts: Mapping[str, Tensor], corpus_B: Tensor, valid_T: Tensor) -> dict[str, Mean]:
        """Metrics of each corpus of a mixture: `<name>/<corpus>`."""
        if len(self.corpora) == 1:
            return {}
        corpus_T = corpus_B.repeat_interleave(len(valid_T) // len(corpus_B))
        means = dict[str, Mean]()
        for number, corpus in enumerate(self.corpora):
            mine_T = valid_T & (corpus_T == number)
            means |= {
                f"{name}/{corpus}": Mean(torch.where(mine_T, part_T, 0.0).sum(), mine_T.sum())
                for name, part_T in parts.items()
            }
        return means


def _peak(config: WeightingConfig, steps: int, step: int) -> float:
    """The largest alpha of a step; only wsd has a warm-up."""
    kind = config.schedule.value
    warmup, decay = (config.warmup * steps if kind == "wsd" else 0.0), config.decay * steps
    return schedule(kind, step, steps, peak=config.alpha, final=config.final_alpha, warmup=warmup, decay=decay)


def _factors(config: WeightingConfig, setting: Setting) -> dict[str, Factor]:
    """Those of the project's own factors that are switched on, by name, in the order of their product."""
    own = {name: getattr(config, name, None) for name in FACTORS.names}
    return {name: FACTORS[name](setting, part) for name, part in own.items() if getattr(part, "enabled", False)}


def _plugins(config: WeightingConfig, setting: Setting) -> dict[str, CheckedFactor]:
    """The factors of the user's modules, by name, in the order of their product."""
    owners = dict.fromkeys([*RUN_METRICS, *(f"{name}_factor" for name in FACTORS.names)], "the run itself")
    factors = {}
    for name, options in config.plugins.items():
        key = f"student.weighting.plugins.{name}"
        factors[name] = CheckedFactor(key, FACTORS[name](setting, Options(key, options)), owners)
    return factors


def _means(parts: Mapping[str, Tensor], valid_T: Tensor, covered_T: Tensor) -> dict[str, Mean]:
    """Metrics of the loss' parts, each over the tokens that it is defined on."""
    tokens_T = {name: covered_T if name in COVERED else valid_T for name in parts}
    return {
        METRIC_NAMES.get(name, name): Mean(torch.where(tokens_T[name], part_T, 0.0).sum(), tokens_T[name].sum())
        for name, part_T in parts.items()
    }
