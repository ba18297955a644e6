"""How much the soft targets count: alpha_T = schedule(step) x product of factors in [0, 1].

A factor is an object of one kind: it has a name, an explicit state that is handed in and returned, a value for each
token, sums that it needs of a step, and metrics. It is asked for the tokens of a chunk while their logits exist, so
that it may depend on what the student predicts there.

A factor that reads a token's own label (`Factor.reads_label`) scales the soft term only: the hard weight then stays
1 - (alpha without it), so that the fixed point of the hard term is still the data's distribution. All others give
w_soft = alpha, w_hard = 1 - alpha.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

State = dict[str, Tensor]
Collective = Callable[[Tensor], Tensor]
"""Sum or minimum over all ranks, in place; returns its argument."""


class Setting(NamedTuple):
    """What is fixed for a whole run."""

    vocab_size: int
    """V of the student."""
    teacher_vocab_size: int
    """V of the teachers whose entropies are read, the largest where they differ."""
    corpora: int
    """C, number of corpora; each has a cache of its own."""
    tokens: int
    """Tokens that the student will train on."""
    draws: float
    """Draws of a soft target by the caches' codec; inf: it stores probabilities."""
    device: torch.device


class Signals(NamedTuple):
    """What factors are computed from, of T tokens; on a device each."""

    corpus_T: Tensor
    """int64."""
    covered_T: Tensor
    """bool: the token has targets and carries loss."""
    entropy_T: Tensor
    """float32 nats, of the teacher's distribution."""
    teacher_loss_T: Tensor
    """float32 nats: the teacher's loss of the token's own label when it made the target."""
    level_T: Tensor
    """float32 nats: the loss of that teacher at that step on a smooth curve over its training; nan: not known."""
    end_T: Tensor
    """float32 nats: where the best teacher of the token's corpus ends on its curve; nan: not known."""
    par_T: Tensor
    """float32 nats: where that teacher was after as many tokens as the student has had; inf: not known."""
    shard_loss_T: Tensor
    """float32 nats: the teacher's mean label loss on the sample's shard; it depends on how the cache is cut."""
    lr_share: float
    """The learning rate of the step as a share of its peak."""
    student_loss_T: Tensor
    """float32 nats: the student's loss of the token's own label; empty before its forward pass."""
    disagreement_T: Tensor
    """float32 nats: by how much the token's soft loss is above the least it can be. Of a cross entropy that is
    KL(teacher || student), an unbiased estimate where targets are drawn; of other losses their divergence. Empty before
    the student's forward pass."""

    def rows(self, rows: slice) -> "Signals":
        """The same of some tokens, as views."""
        parts = {name: part[rows] for name, part in self._asdict().items() if isinstance(part, Tensor)}
        return self._replace(**parts)  # type: ignore[arg-type]


class Mean(NamedTuple):
    """A metric as a sum over items and their number, scalars, to be added up over batches and ranks."""

    sum: Tensor | float
    weight: Tensor | float


class Factor(Protocol):
    """One part of alpha.

    The classes are registered in `FACTORS` of `distill.config.registry` and called with (Setting, options).
    """

    reads_label: bool
    """The value depends on the token's own label (through `teacher_loss_T` or `student_loss_T`)."""

    def init(self) -> State:
        """The state at the start of a run."""
        ...

    def observe(self, state: State, signals: Signals, total: Collective) -> State:
        """The state after this rank's share of a whole optimizer step was seen, before its forward passes; the
        student's losses are not there yet. Collective."""
        ...

    def value(self, state: State, signals: Signals) -> Tensor:
        """The factor of each token, float32 [T] in [0, 1]."""
        ...

    def sums(self, state: State, signals: Signals) -> Tensor:
        """fp64, of one shape: what `update` needs of a micro-batch, summed over its tokens."""
        ...

    def update(self, state: State, sums: Tensor) -> State:
        """The state after a step whose micro-batches' `sums`, of all ranks, add up to this."""
        ...

    def metrics(self, state: State, signals: Signals, value_T: Tensor) -> Mapping[str, Mean]:
        """What is logged of tokens for which `value` returned value_T, beside its mean and histogram."""
        ...


class Weights(NamedTuple):
    """Of t tokens; float32."""

    hard_t: Tensor
    soft_t: Tensor
    """Zero where a token has no targets."""
    values: dict[str, Tensor]
    """[t] of each factor."""


class Weighting:
    """Schedule and factors of one student; all methods are functions of their arguments.

    Args:
        peak: step -> largest alpha.
    """

    def __init__(self, peak: Callable[[int], float], factors: Mapping[str, Factor]):
        self.peak, self.factors = peak, factors

    def init(self) -> dict[str, State]:
        """By the name of each factor."""
        return {name: factor.init() for name, factor in self.factors.items()}

    def observe(self, state: dict[str, State], signals: Signals, total: Collective) -> dict[str, State]:
        return {name: factor.observe(state[name], signals, total) for name, factor in self.factors.items()}

    def weigh(self, state: dict[str, State], step: int, signals: Signals) -> Weights:
        """The weights of tokens of which some have targets; a token without keeps its hard loss alone."""
        soft_t = self.peak(step) * signals.covered_T.float()
        hard_t = 1.0 - soft_t
        values = {}
        for name, factor in self.factors.items():
            values[name] = factor.value(state[name], signals)
            soft_t = soft_t * values[name]
            if not factor.reads_label:
                hard_t = 1.0 - (1.0 - hard_t) * values[name]
        return Weights(hard_t, soft_t, values)

    def sums(self, state: dict[str, State], signals: Signals) -> dict[str, Tensor]:
        return {name: factor.sums(state[name], signals) for name, factor in self.factors.items()}

    def metrics(self, state: dict[str, State], signals: Signals, values: Mapping[str, Tensor]) -> dict[str, Mean]:
        """Of a micro-batch: each factor's mean over covered tokens, `<name>_factor`, and its own metrics."""
        means, covered = dict[str, Mean](), signals.covered_T.sum()
        for name, factor in self.factors.items():
            means[f"{name}_factor"] = Mean(torch.where(signals.covered_T, values[name], 0.0).sum(), covered)
            means |= factor.metrics(state[name], signals, values[name])
        return means

    def update(self, state: dict[str, State], sums: Mapping[str, Tensor]) -> dict[str, State]:
        return {name: factor.update(state[name], sums[name]) for name, factor in self.factors.items()}


def to_json(state: Mapping[str, State]) -> dict[str, dict[str, Any]]:
    """A state as JSON-able numbers, exact; infinity is null."""
    return {
        name: {key: [None if x == float("inf") else x for x in tensor.tolist()] for key, tensor in part.items()}
        for name, part in state.items()
    }


def from_json(stored: Mapping[str, Mapping[str, Any]], like: Mapping[str, State]) -> dict[str, State]:
    """What `to_json` gave, in the dtypes and on the devices of another state of the same factors."""
    return {
        name: {
            key: torch.tensor(
                [float("inf") if x is None else x for x in stored[name][key]], dtype=tensor.dtype, device=tensor.device
            )
            for key, tensor in part.items()
        }
        for name, part in like.items()
    }
