"""Intervals of the mean of paired differences, and what they say about a limit."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
_POINTS = 4001
"""Of the rule of Simpson that integrates a density."""


class Interval(NamedTuple):
    """Of a mean, by Student's t."""

    mean: float
    low: float
    high: float
    pairs: int

    def verdict(self, limit: float) -> str:
        """pass: the whole interval is below the limit; fail: it is above; else undecided."""
        return "pass" if self.high < limit else "fail" if self.low > limit else "undecided"


def interval(differences: Sequence[float]) -> Interval:
    """Of differences that are independent of each other; infinite where there is but one."""
    n, mean = len(differences), float(np.mean(differences))
    if n < 2:
        return Interval(mean, -math.inf, math.inf, n)
    half = t_quantile(0.5 + CONFIDENCE / 2, n - 1) * float(np.std(differences, ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def t_quantile(share: float, freedom: int) -> float:
    """The number that a t-distributed variable is below with probability `share`, which is at least a half."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 + _mass(middle, freedom) < share else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _mass(angle: float, freedom: int) -> float:
    """Probability from 0 to sqrt(freedom) tan(angle): there the density is that of cos(angle)^(freedom - 1)."""
    angles = np.linspace(0.0, angle, _POINTS)
    weights = np.ones(_POINTS)
    weights[1:-1:2], weights[2:-1:2] = 4.0, 2.0
    area = float((weights * np.cos(angles) ** (freedom - 1)).sum()) * angle / (_POINTS - 1) / 3
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(math.pi)
    return area * math.exp(log_scale)
