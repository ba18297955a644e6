"""The exchangeable parts that a Transformer is built of: its products and the dispatcher of its experts."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F

from distill.config.registry import DISPATCHERS
from distill.model.dispatch import LocalDispatcher
from distill.model.linear import NATIVE, GroupedFn, LinearFn, Plain, grouped_mm
from distill.model.precision import Numerics


class Parts(NamedTuple):
    """One value for every place that builds a model; the defaults are plain products in one process."""

    linear_fn: LinearFn = F.linear
    """Product of attention projections and feed-forwards."""
    grouped_fn: GroupedFn = grouped_mm
    """Product of the routed experts."""
    dispatcher: LocalDispatcher = LocalDispatcher()
    plain: Plain = NATIVE
    """Products of vision, attention scores, logits outside of a loss, and the projection of hidden states. Those of
    routers are always fp32."""
    multiple: int = 1
    """The first two take widths that are multiples of it."""

    @staticmethod
    def of(numerics: Numerics, dispatcher: str = "local") -> Parts:
        """The parts of a precision (`distill.model.precision.numerics_of`) and the key `engine.dispatcher`."""
        way = DISPATCHERS[dispatcher]()
        way.row_multiple = numerics.multiple
        return Parts(numerics.linear_fn, numerics.grouped_fn, way, numerics.plain, numerics.multiple)


PLAIN = Parts()
