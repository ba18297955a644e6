"""From numbers to a chart's coordinates: thinning, smoothing, ranges, ticks and their text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from distill.config.units import short

POINTS = 600
"""Most points of a drawn curve: about what a chart has pixels for."""


@dataclass(frozen=True)
class Axis:
    """The stretch of numbers that one side of a chart shows; a logarithmic one is positive throughout.

    Of one number alone, or of what rounds to it, it is the stretch above.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not self.high - self.low > 1e-12 * max(abs(self.low), abs(self.high)):
            object.__setattr__(self, "high", self.low * 10 if self.log else self.low + (abs(self.low) or 1.0))

    def share(self, values: np.ndarray | float) -> np.ndarray:
        """How far along the axis values lie, of any shape: 0 at `low`, 1 at `high`."""
        if self.log:
            return np.log(np.asarray(values) / self.low) / math.log(self.high / self.low)
        return (np.asarray(values) - self.low) / (self.high - self.low)

    def marks(self) -> list[tuple[float, str]]:
        """Ticks and their text."""
        if not self.log:
            return list(zip(found := ticks(self.low, self.high), labels(found), strict=True))
        decades = math.log10(self.high / self.low)
        if decades < 1:  # too short for powers of ten: round numbers, which lie unevenly
            return list(zip(found := ticks(self.low, self.high), labels(found), strict=True))
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        every, factors = (1, (1, 2, 5)) if decades < 3 else (math.ceil(decades / 8), (1,))
        values = [factor * 10.0**power for power in powers if power % every == 0 for factor in factors]
        shown = [value for value in values if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)]
        return [(value, short(value).replace("e-0", "e-")) for value in shown]


def extremes(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS of the points [N]: the lowest and highest of each stretch, so that no spike is lost."""
    if len(x) <= POINTS:
        return x, y
    kept = set()
    for part in np.array_split(np.arange(len(x)), POINTS // 2):
        kept |= {part[0] + int(np.argmin(y[part])), part[0] + int(np.argmax(y[part]))}
    chosen = np.array(sorted(kept))
    return x[chosen], y[chosen]


def means(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS points: the last x and the mean y of each stretch of the points [N]."""
    if len(x) <= POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), POINTS)
    return np.array([x[part[-1]] for part in parts]), np.array([y[part].mean() for part in parts])


def smooth(y: np.ndarray) -> np.ndarray:
    """y [N] under a triangle that reaches over 4 % of the points to either side; short curves stay as they are."""
    reach = len(y) // 25
    if reach < 2:
        return y
    kernel = reach - np.abs(np.arange(1 - reach, reach))
    return np.convolve(y, kernel, "same") / np.convolve(np.ones(len(y)), kernel, "same")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) in [low, high]."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((power * factor for factor in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / rough)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def labels(values: list[float]) -> list[str]:
    """Texts of evenly spaced ticks, all with the same number of decimals."""
    if max(map(abs, values), default=0.0) >= 10_000:
        return [short(value) for value in values]
    step = values[1] - values[0] if len(values) > 1 else abs(values[0]) if values else 1.0
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
    if digits > 4:
        return [f"{value:.2g}".replace("e-0", "e-") for value in values]
    return [f"{value:.{digits}f}".replace("-", "−") for value in values]


def positive(x: np.ndarray, y: np.ndarray, log_x: bool, log_y: bool) -> tuple[np.ndarray, np.ndarray]:
    """The points [N] that have a place on the axes."""
    kept = np.ones(len(x), dtype=bool)
    if log_x:
        kept &= x > 0
    if log_y:
        kept &= y > 0
    return x[kept], y[kept]


def x_axis(curves: list[tuple[np.ndarray, np.ndarray]], *, log: bool = False) -> Axis:
    """The axis of x for (x, y) curves: from 0, or where logarithmic from the first x; some room for the last dot."""
    right = max(float(x[-1]) for x, _ in curves)
    if not log:
        return Axis(0.0, 1.01 * right)
    left = min(float(x[0]) for x, _ in curves)
    air = (right / left) ** 0.02 if right > left else 2.0
    return Axis(left / air, right * air, log=True)


def y_axis(curves: list[tuple[np.ndarray, np.ndarray]], *, zero: bool, log: bool = False, whole: bool = False) -> Axis:
    """The axis of y for (x, y) curves, with some air.

    Unless `whole`, the first twentieth of x does not count, nor do the outermost hundredths of y: how far a loss falls
    in its first steps, or a single spike, would flatten everything else. zero: a linear range starts at 0.
    """
    start = -math.inf if whole else max(x[-1] for x, _ in curves) / 20
    late = [y[x >= start] if (x >= start).any() else y for x, y in curves]
    if log:
        late = [np.log(y) for y in late]
    outside = 0.0 if whole else 0.01
    low = min(float(np.quantile(y, outside)) for y in late)
    high = max(float(np.quantile(y, 1 - outside)) for y in late)
    if zero and low >= 0 and not log:
        low = 0.0
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
    air = 0.06 * (high - low)
    low, high = low if zero and low == 0 and not log else low - air, high + air
    return Axis(math.exp(low), math.exp(high), log=True) if log else Axis(low, high)
