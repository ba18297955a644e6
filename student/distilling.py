"""The student's recipe: soft and hard loss in one pass, weighted per token by a schedule and factors."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill.config.errors import ConfigError
from distill.config.registry import FACTORS, LOSSES, Options
from distill.config.schema import StudentConfig, WeightingConfig
from distill.data.join import Batch
from distill.engine.dist import Dist
from distill.engine.optim import learning_rate
from distill.engine.recipe import Forward, Recipe
from losses import Mixed, fixed, head_loss, weighting
from losses.mixed import Weigh
from losses.schedule import schedule
from losses.weighting import Factor, Mean, Setting, Signals, State, Weighting
from student.checked_factor import RUN_METRICS, CheckedFactor

ALPHA_BINS = 20
COVERED = ("soft", "mass", "agreement", "soft_norm")
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


class Sums(NamedTuple):
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
    """

    def __init__(
        self, config: StudentConfig, dist: Dist, setting: Setting, steps: int, corpora: Sequence[str] = ("main",)
    ):
        self.config, self.dist, self.steps, self.corpora = config, dist, steps, corpora
        self._plugins = _plugins(config.weighting, setting)
        factors = _factors(config.weighting, setting) | self._plugins
        self.weighting = Weighting(partial(_peak, config.weighting, steps), factors)
        self.weighting_state = self.weighting.init()
        self.covered = torch.zeros(2, dtype=torch.float64, device=dist.device)
        """Valid tokens so far: those with targets, and all."""

    def begin(self, batch: Batch, step: int) -> StepPlan:
        """The factors' view of the whole optimizer step; collective."""
        lr_share = learning_rate(self.config.optim, step, self.steps) / self.config.optim.lr
        state = self.weighting_state
        if batch.targets is not None:
            signals = _signals(batch, torch.device("cpu"), lr_share)
            state = self.weighting.observe(state, signals, self.dist.sum)
        return StepPlan(step, state, lr_share, (step + 1) % self.config.train.log_every == 0)

    def forward(self, model: Any, micro: Batch, plan: StepPlan) -> Forward:
        """Sum over valid tokens of soft and hard loss, weighted (nats); the result is the sums that `end` takes."""
        labels_T, valid_T = micro.labels_BS.flatten(), micro.valid_BS.flatten()
        weigher: Weigher | None = None
        weigh: Weigh
        weigh, soft = fixed(valid_T.float()), tuple[Tensor, ...]()
        if micro.targets is not None:
            signals = _signals(micro, valid_T.device, plan.lr_share)
            weigher = Weigher(self.weighting, plan, signals, valid_T)
            weigh, soft = weigher, (micro.targets.ids_TK, micro.targets.probs_TK)
        rows = LOSSES[self.config.loss](labels_T, weigh, *soft)
        if isinstance(rows, Mixed):
            rows = rows._replace(norms=plan.norms)
        head_fn = partial(head_loss, row_function=rows, chunk=self.config.train.head_chunk)
        head, routing = model(micro.ids_BS, micro.documents_BS, head_fn, micro.images)
        means = {"loss": Mean(head.loss_sum.detach(), valid_T.sum())}
        histograms: dict[str, Tensor] = {}
        sums, covered_T = dict[str, Tensor](), torch.zeros_like(valid_T)
        corpus_B = torch.as_tensor(micro.corpus_B).to(valid_T.device, non_blocking=True)
        per_corpus = {"hard_loss": head.parts["hard"]}
        if weigher is not None:
            covered_T = weigher.signals.covered_T
            weighed = weigher.whole()
            means |= _target_means(weighed, head.parts)
            means |= self.weighting.metrics(plan.state, weighed.signals, weighed.values)
            histograms = _histograms(weighed)
            sums = self.weighting.sums(plan.state, weighed.signals)
            per_corpus["alpha"] = weighed.soft_T
        means |= _means(head.parts, valid_T, covered_T) | self._by_corpus(per_corpus, corpus_B, valid_T)
        tokens_2 = torch.stack([covered_T.sum(), valid_T.sum()]).double()
        return Forward(head.loss_sum, routing, means, histograms, Sums(sums, tokens_2))

    def end(self, plan: StepPlan, results: list[Sums]) -> None:
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
        return {"weighting": weighting.to_json(self.weighting_state), "covered": self.covered.tolist()}

    def load_state(self, state: dict[str, Any]) -> None:
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
            means |= {f"{name}/{corpus}": Mean((part_T * mine_T).sum(), mine_T.sum()) for name, part_T in parts.items()}
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


def _signals(batch: Batch, device: torch.device, lr_share: float) -> Signals:
    """All but what the student predicts."""
    assert batch.targets is not None
    targets, length = batch.targets, batch.ids_BS.shape[1]
    none = targets.entropy_T.new_empty(0)

    def tokens(part_B: Tensor) -> Tensor:
        return part_B.to(device, non_blocking=True).repeat_interleave(length)

    return Signals(
        corpus_T=tokens(torch.as_tensor(batch.corpus_B)),
        covered_T=targets.covered_T & batch.valid_BS.flatten(),
        entropy_T=targets.entropy_T,
        teacher_loss_T=-targets.label_logprob_T,
        level_T=tokens(batch.level_B),
        end_T=tokens(batch.end_B),
        shard_loss_T=tokens(batch.shard_loss_B),
        lr_share=lr_share,
        student_loss_T=none,
        disagreement_T=none,
    )


class Weighed(NamedTuple):
    """The weights of a micro-batch, [T] each."""

    signals: Signals
    valid_T: Tensor
    hard_T: Tensor
    soft_T: Tensor
    values: dict[str, Tensor]


class Weigher:
    """Weights for a row function, chunk after chunk, and what became of them."""

    def __init__(self, weighting: Weighting, plan: StepPlan, signals: Signals, valid_T: Tensor):
        self.weighting, self.plan, self.signals, self.valid_T = weighting, plan, signals, valid_T
        self._chunks: list[Weighed] = []

    def __call__(self, rows: slice, hard_t: Tensor, soft_t: Tensor | None) -> tuple[Tensor, Tensor]:
        signals, valid_t = self.signals.rows(rows), self.valid_T[rows].float()
        assert soft_t is not None
        signals = signals._replace(student_loss_T=hard_t, disagreement_T=soft_t - signals.entropy_T)
        weights = self.weighting.weigh(self.plan.state, self.plan.step, signals)
        hard_t, soft_t = weights.hard_t * valid_t, weights.soft_t * valid_t
        self._chunks.append(Weighed(signals, self.valid_T[rows], hard_t, soft_t, weights.values))
        return hard_t, soft_t

    def whole(self) -> Weighed:
        """Of all chunks that were weighed."""
        signals, _, hard, soft, values = zip(*self._chunks)
        names = self.weighting.factors
        return Weighed(
            self.signals._replace(
                student_loss_T=torch.cat([part.student_loss_T for part in signals]),
                disagreement_T=torch.cat([part.disagreement_T for part in signals]),
            ),
            self.valid_T,
            torch.cat(hard),
            torch.cat(soft),
            {name: torch.cat([part[name] for part in values]) for name in names},
        )


def _means(parts: Mapping[str, Tensor], valid_T: Tensor, covered_T: Tensor) -> dict[str, Mean]:
    """Metrics of the loss' parts, each over the tokens that it is defined on."""
    tokens_T = {name: covered_T if name in COVERED else valid_T for name in parts}
    return {
        METRIC_NAMES.get(name, name): Mean((part_T * tokens_T[name]).sum(), tokens_T[name].sum())
        for name, part_T in parts.items()
    }


def _target_means(weighed: Weighed, parts: Mapping[str, Tensor]) -> dict[str, Mean]:
    """Metrics of the targets and their weights.

    On the same tokens: `teacher_lead`, nats by which the teacher's loss was below the student's, and `disagreement`,
    KL(teacher || student). `lag`, nats by which the teacher was worse than where the best one ends; `effective_weight`,
    the soft term's share of the norms of both terms' gradients at the logits.
    """
    signals, covered_T = weighed.signals, weighed.signals.covered_T
    tokens = covered_T.sum()

    def mean(part_T: Tensor) -> Mean:
        return Mean(torch.where(covered_T, part_T, 0.0).sum(), tokens)

    valid = weighed.valid_T.sum()
    means = {
        "alpha": Mean(weighed.soft_T.sum(), valid),
        "coverage": Mean(tokens, valid),
        "teacher_loss": mean(signals.teacher_loss_T),
        "teacher_lead": mean(signals.student_loss_T - signals.teacher_loss_T),
        "disagreement": mean(signals.disagreement_T),
        "lag": mean(torch.nan_to_num(signals.level_T - signals.end_T)),
    }
    if "soft_norm" in parts:
        soft, hard = (weighed.soft_T * parts["soft_norm"]).sum(), (weighed.hard_T * parts["hard_norm"]).sum()
        means["effective_weight"] = Mean(soft, soft + hard)
    return means


def _histograms(weighed: Weighed) -> dict[str, Tensor]:
    """Counts of equal bins over [0, 1], of alpha over valid tokens and of each factor over tokens with targets."""
    covered_T = weighed.signals.covered_T
    counted = {"alpha": (weighed.soft_T, weighed.valid_T)}
    counted |= {f"{name}_factor": (value_T, covered_T) for name, value_T in weighed.values.items()}
    histograms = {}
    for name, (value_T, tokens_T) in counted.items():
        bins_T = (value_T * ALPHA_BINS).long().clamp(0, ALPHA_BINS - 1)
        # index_add_, not bincount: that would wait for the device.
        histograms[name] = value_T.new_zeros(ALPHA_BINS).index_add_(0, bins_T, tokens_T.float())
    return histograms
