"""What teacher and student put into the training loop: a recipe, and what its forward passes return."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from distill.model.transformer import Routing
from losses.weighting import Mean


@dataclass(frozen=True)
class Forward:
    """What a forward pass of a micro-batch returns to the training loop."""

    loss_sum: Tensor
    """Scalar with its graph, nats, summed over valid tokens."""
    routing: Routing
    means: Mapping[str, Mean]
    """Metrics by name, detached."""
    histograms: Mapping[str, Tensor] = field(default_factory=dict)
    """Counts of equal bins over [0, 1] by name."""
    result: Any = None
    """What the recipe needs of it at the end of the step, detached."""


class Recipe(ABC):
    """One role's part of the training loop; all but `forward` may be collective.

    Batches are `distill.data.join.Batch`. By default a recipe has no state and publishes nothing.
    """

    def ready(self, batch: Any, parts: int) -> Any:
        """This rank's rows of a whole optimizer step with what the recipe adds to them, before `begin`.

        parts: micro-batches that they are cut into.
        """
        return batch

    def begin(self, batch: Any, step: int) -> Any:
        """What this rank's rows of a whole optimizer step decide: a value that is handed to `forward` and `end`."""
        return step

    @abstractmethod
    def forward(self, model: Any, micro: Any, plan: Any) -> Forward:
        """The pass over a micro-batch."""

    @abstractmethod
    def end(self, plan: Any, results: list[Any]) -> None:
        """Moves the recipe's state on, by the results of the step's forward passes."""

    def publish(self, last: bool) -> None:  # noqa: B027
        """Makes visible to others what is done so far; `last`: the run's last step is done."""

    def metrics(self) -> dict[str, float]:
        """Further metrics of a logged row, from the host."""
        return {}

    def state(self) -> dict[str, Any]:
        """JSON-able numbers, exact, for `load_state` after a resume."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        assert not state, state

    def hand_over(self) -> dict[str, Tensor]:
        """Takes away what this rank has begun and not published, for `take_back` after a resume."""
        return {}

    def take_back(self, tensors: dict[str, Tensor]) -> None:
        assert not tensors, list(tensors)
