"""A factor of alpha that a user's module adds, held to what `losses.weighting.Factor` promises."""

from collections.abc import Mapping

import torch
from torch import Tensor

from distill.config.errors import ConfigError
from losses.weighting import Collective, Factor, Mean, Signals, State

RUN_METRICS = frozenset({
    "job", "step", "tokens", "tokens_per_second", "stall", "lr", "grad_norm", "expert_entropy", "expert_max_load",
    "dead_experts", "balance_loss", "z_loss", "loss", "hard_loss", "soft_loss", "mass", "agreement", "alpha",
    "coverage", "teacher_loss", "teacher_lead", "disagreement", "lag", "student_place", "effective_weight",
    "hard_grad_norm", "soft_grad_norm", "heldout_loss", "heldout_accuracy", "hidden_match",
})  # fmt: skip
"""Names that a row of metrics.jsonl has by itself."""
ROUNDING = 1e-5
"""By so much a value may be outside of [0, 1]."""


class CheckedFactor(Factor):
    """A factor whose values and metrics are checked.

    Args:
        key: of its options in the configuration, for messages.
        owners: of each metric's name, what has it; shared by the factors of a run.
    """

    def __init__(self, key: str, factor: Factor, owners: dict[str, str]):
        self._key, self._factor, self._owners = key, factor, owners
        self._bounds: Tensor | None = None
        """Least and greatest value since `problem` was asked, [2], on the device; nan where one was."""

    def init(self) -> State:
        return self._factor.init()

    @property
    def reads_label(self) -> bool:  # type: ignore[override]
        return self._factor.reads_label

    def observe(self, state: State, signals: Signals, total: Collective) -> State:
        return self._factor.observe(state, signals, total)

    def value(self, state: State, signals: Signals) -> Tensor:
        """The factor of each token; ConfigError: it has another shape. What it is, is noted for `problem`."""
        value_T, tokens = self._factor.value(state, signals), len(signals.entropy_T)
        shape = list(getattr(value_T, "shape", ()))
        if shape != [tokens]:
            raise ConfigError(
                f"{self._key}: the factor's value has shape {shape}; it must be [{tokens}], a number for each token"
            )
        low, high = value_T.detach().float().aminmax()
        if self._bounds is not None:
            low, high = torch.minimum(low, self._bounds[0]), torch.maximum(high, self._bounds[1])
        self._bounds = torch.stack([low, high])
        return value_T

    def sums(self, state: State, signals: Signals) -> Tensor:
        return self._factor.sums(state, signals)

    def update(self, state: State, sums: Tensor) -> State:
        return self._factor.update(state, sums)

    def metrics(self, state: State, signals: Signals, value_T: Tensor) -> Mapping[str, Mean]:
        """The factor's metrics; ConfigError: the run, or another factor, has one of that name."""
        means = self._factor.metrics(state, signals, value_T)
        for name in means:
            owner = self._owners.setdefault(name, self._key)
            if owner != self._key:
                raise ConfigError(f"{self._key}: the factor's metric {name} is one of {owner}; give it another name")
        return means

    def problem(self) -> str | None:
        """A sentence about values outside of [0, 1] since the last call; waits for the device."""
        low, high = (0.0, 0.0) if self._bounds is None else self._bounds.tolist()
        self._bounds = None
        wrong = [value for value in (low, high) if not -ROUNDING <= value <= 1 + ROUNDING]
        return f"{self._key}: the factor's value was {wrong[0]:g}; allowed: 0 to 1" if wrong else None
