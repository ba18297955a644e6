"""The exchangeable parts that a Transformer is built of: two matrix products and the dispatcher of its experts."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F

from distill.config.registry import DISPATCHERS, PRECISIONS
from distill.model.dispatch import LocalDispatcher
from distill.model.linear import GroupedFn, LinearFn, grouped_mm


class Parts(NamedTuple):
    """One value for every place that builds a model; the defaults are plain products in one process."""

    linear_fn: LinearFn = F.linear
    """Product of attention projections and feed-forwards; router, embedding, head and vision never use it."""
    grouped_fn: GroupedFn = grouped_mm
    """Product of the routed experts."""
    dispatcher: LocalDispatcher = LocalDispatcher()

    @staticmethod
    def of(precision: str, dispatcher: str = "local") -> Parts:
        """The parts that a run's keys `precision` and `engine.dispatcher` name."""
        numerics = PRECISIONS[precision]
        return Parts(numerics.linear_fn, numerics.grouped_fn, DISPATCHERS[dispatcher]())


PLAIN = Parts()
