"""What a forward pass of a micro-batch returns to the training loop."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from distill.model.transformer import Routing
from losses.weighting import Mean


@dataclass(frozen=True)
class Forward:
    loss_sum: Tensor
    """Scalar with its graph, nats, summed over valid tokens."""
    routing: Routing
    means: Mapping[str, Mean]
    """Metrics by name, detached."""
    histograms: Mapping[str, Tensor] = field(default_factory=dict)
    """Counts of equal bins over [0, 1] by name."""
    result: Any = None
    """What the recipe needs of it at the end of the step, detached."""
