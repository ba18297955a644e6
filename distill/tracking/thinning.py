"""From many numbers to what a chart has room for: fewer points, smooth curves, ranges and ticks of axes."""

import math

import numpy as np

from distill.config.units import short

Points = tuple[np.ndarray, np.ndarray]
"""x [N], ascending, and y [N]."""
SMOOTHED = 50
"""Points of the shortest curve that is smoothed."""


def extremes(x: np.ndarray, y: np.ndarray, most: int) -> Points:
    """At most `most` of the points [N]: the lowest and highest of each stretch, so that no spike is lost."""
    if len(x) <= most:
        return x, y
    kept = set()
    for part in np.array_split(np.arange(len(x)), most // 2):
        kept |= {part[0] + int(np.argmin(y[part])), part[0] + int(np.argmax(y[part]))}
    chosen = np.array(sorted(kept))
    return x[chosen], y[chosen]


def means(x: np.ndarray, y: np.ndarray, most: int) -> Points:
    """At most `most` points: the last x and the mean y of each stretch of the points [N]."""
    if len(x) <= most:
        return x, y
    parts = np.array_split(np.arange(len(x)), most)
    return np.array([x[part[-1]] for part in parts]), np.array([y[part].mean() for part in parts])


def smooth(y: np.ndarray) -> np.ndarray:
    """y [N] under a triangle that reaches over 4 % of the points to either side; N is at least SMOOTHED."""
    reach = len(y) // 25
    kernel = reach - np.abs(np.arange(1 - reach, reach))
    return np.convolve(y, kernel, "same") / np.convolve(np.ones(len(y)), kernel, "same")


def x_range(curves: list[Points], *, log: bool) -> tuple[float, float]:
    """From 0, or on a logarithmic axis from the first x, to the last x, with some room for the last point."""
    right = max(float(x[-1]) for x, _ in curves)
    if not log:
        return 0.0, 1.01 * (right or 1.0)
    left = min(float(x[0]) for x, _ in curves)
    air = (right / left) ** 0.02 if right > left else 2.0
    return left / air, right * air


def y_range(curves: list[Points], *, zero: bool, log: bool, whole: bool) -> tuple[float, float]:
    """The lowest and the highest y of the curves, with some room.

    Unless `whole`, or where all curves are short, the first twentieth of x does not count, nor do the outermost
    hundredths of y: how far a loss falls in its first steps, or a single spike, would flatten everything else. zero: a
    linear range starts at 0.
    """
    whole = whole or max(len(x) for x, _ in curves) < SMOOTHED
    start = -math.inf if whole else max(x[-1] for x, _ in curves) / 20
    late = [y[x >= start] if (x >= start).any() else y for x, y in curves]
    if log:
        late = [np.log(y) for y in late]
    outside = 0.0 if whole else 0.01
    low = min(float(np.quantile(y, outside)) for y in late)
    high = max(float(np.quantile(y, 1 - outside)) for y in late)
    from_zero = zero and low >= 0 and not log
    if from_zero:
        low = 0.0
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
    air = 0.06 * (high - low)
    low, high = low if from_zero else low - air, high + air
    return (math.exp(low), math.exp(high)) if log else (low, high)


def log_ticks(low: float, high: float) -> dict[float, str]:
    """Ticks of a logarithmic axis: powers of ten, below three decades with 2 and 5 times them, and at least two."""
    decades = math.log10(high / low)
    if decades < 1:  # too short for powers of ten: round numbers, which are not evenly spaced
        step = 10.0 ** math.floor(math.log10((high - low) / 2))
        step = next(step * factor for factor in (5, 2, 1) if (high - low) / (step * factor) >= 2)
        values = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
        return {value: f"{value:.6g}" for value in values}
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every, factors = (1, (1, 2, 5)) if decades < 3 else (math.ceil(decades / 8), (1,))
    values = [factor * 10.0**power for power in powers if power % every == 0 for factor in factors]
    return {value: short(value).replace("e-0", "e-") for value in values if low <= value <= high}
