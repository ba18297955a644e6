"""How much the soft targets count: alpha_T = schedule(step) x product of factors in [0, 1].

A factor is an object of one kind: it has a name, an explicit state that is handed in and returned, a value for each
token, and metrics. No factor of ours depends on the label of its own token, so the fixed point of the loss stays the
proper mixture (1 - alpha) q + alpha p and calibration is safe.
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
    best_teacher_loss_C: Tensor
    """fp64 nats: least mean loss of a shard in the cache of each corpus C; inf: not known before it is read."""


class Signals(NamedTuple):
    """What factors are computed from, of B samples and their T tokens."""

    corpus_B: Tensor
    """int64, the corpus of each sample."""
    shard_loss_B: Tensor
    """float32 nats: the teacher's mean label loss on the sample's shard when captured; nan: no targets."""
    entropy_T: Tensor
    """float32 nats, of the teacher's distribution."""
    covered_T: Tensor
    """bool: the token has targets and carries loss."""


class Mean(NamedTuple):
    """A metric as a sum over items and their number, scalars, to be added up over batches and ranks."""

    sum: Tensor | float
    weight: Tensor | float


class Factor(Protocol):
    """One part of alpha.

    The classes are registered in `FACTORS` of `distill.config.registry` and called with (Setting, options).
    """

    def init(self) -> State:
        """The state at the start of a run."""
        ...

    def observe(self, state: State, signals: Signals, total: Collective, least: Collective) -> State:
        """The state after this rank's share of a whole optimizer step was seen, before it is weighed. Collective."""
        ...

    def value(self, state: State, signals: Signals) -> Tensor:
        """The factor of each token, float32 [T] in [0, 1]."""
        ...

    def update(self, state: State, hard_loss_C: Tensor) -> State:
        """The state after a step in which the student's mean hard loss on each corpus was this; nan: no tokens."""
        ...

    def metrics(self, state: State, signals: Signals, value_T: Tensor) -> Mapping[str, Mean]:
        """What is logged of tokens for which `value` returned value_T."""
        ...


class Weights(NamedTuple):
    """Of T tokens."""

    alpha_T: Tensor
    """float32; zero where a token has no targets."""
    means: dict[str, Mean]
    """Metrics of the factors."""


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

    def observe(
        self, state: dict[str, State], signals: Signals, total: Collective, least: Collective
    ) -> dict[str, State]:
        return {name: f.observe(state[name], signals, total, least) for name, f in self.factors.items()}

    def weigh(self, state: dict[str, State], step: int, signals: Signals, covered_T: Tensor) -> Weights:
        """The weights of tokens of which some have targets (`covered_T`, bool)."""
        alpha_T = self.peak(step) * covered_T.float()
        means: dict[str, Mean] = {}
        for name, factor in self.factors.items():
            value_T = factor.value(state[name], signals)
            alpha_T = alpha_T * value_T
            means |= factor.metrics(state[name], signals, value_T)
        return Weights(alpha_T, means)

    def update(self, state: dict[str, State], hard_loss_C: Tensor) -> dict[str, State]:
        return {name: factor.update(state[name], hard_loss_C) for name, factor in self.factors.items()}


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
