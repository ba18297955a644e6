"""The picture of a study: what the new arm and the best static one gain over labels, against the teacher's lead."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from distill.tracking.drawing import line, page, text

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 440, 70, 690, 70, 380
"""Pixels: of the picture, and ends of the axes."""
NEW, STATIC = "#1f7fc4", "#d55e00"


class Point(NamedTuple):
    """One regime; nats."""

    name: str
    lead: float
    gain: float
    """Of the new arm over labels."""
    low: float
    high: float
    """Ends of its interval."""
    static: float
    """Gain of the best static arm."""


class _Scale(NamedTuple):
    first: float
    last: float
    begin: int
    end: int
    """Pixels."""

    def __call__(self, value: float) -> float:
        return self.begin + (value - self.first) / (self.last - self.first) * (self.end - self.begin)

    def ticks(self) -> list[float]:
        step = 10.0 ** math.floor(math.log10((self.last - self.first) / 2))
        step *= next(m for m in (1, 2, 5, 10) if (self.last - self.first) / (step * m) <= 6)
        first = math.ceil(self.first / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.last / step + 1e-9) + 1)]


def svg(title: str, points: Sequence[Point]) -> str:
    """A dot with its interval for the new arm, a ring for the best static one, and a name, for each regime."""
    leads = [point.lead for point in points if math.isfinite(point.lead)]
    gains = [value for point in points for value in (point.low, point.high, point.static) if math.isfinite(value)]
    x, y = _scale([0.0, *leads], LEFT, RIGHT), _scale([0.0, *gains], BOTTOM, TOP)
    parts = [text(16, 24, title)]
    for place, (label, color, fill) in enumerate((("new", NEW, NEW), ("best static", STATIC, "none"))):
        parts += [_dot(LEFT + 8 + 90 * place, 46, color, fill), text(LEFT + 20 + 90 * place, 50, label)]
    for tick in x.ticks():
        parts += [line(x(tick), TOP, x(tick), BOTTOM), text(x(tick), BOTTOM + 18, f"{tick:g}", "quiet", "middle")]
    for tick in y.ticks():
        parts += [line(LEFT, y(tick), RIGHT, y(tick)), text(LEFT - 8, y(tick) + 4, f"{tick:g}", "quiet", "end")]
    parts.append(line(LEFT, y(0.0), RIGHT, y(0.0), 2))
    parts.append(text(RIGHT, BOTTOM + 40, "teacher's lead over labels at its end, nats", "quiet", "end"))
    parts.append(text(RIGHT, 50, "gain over labels, nats", "quiet", "end"))
    for point in points:
        if math.isfinite(point.lead):
            at = x(point.lead)
            ends = [end if math.isfinite(end) else point.gain for end in (point.low, point.high)]
            parts.append(line(at, y(ends[0]), at, y(ends[1]), 3))
            parts += [_dot(at, y(point.static), STATIC, "none"), _dot(at, y(point.gain), NEW, NEW)]
            side, anchor = (-9, "end") if at > (LEFT + RIGHT) / 2 else (9, "start")
            parts.append(text(at + side, y(point.gain) - 6, point.name, "", anchor))
    return page(WIDTH, HEIGHT, title, parts)


def _scale(values: Sequence[float], begin: int, end: int) -> _Scale:
    room = (max(values) - min(values)) * 0.08 or 0.01
    return _Scale(min(values) - room, max(values) + room, begin, end)


def _dot(x: float, y: float, color: str, fill: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}" stroke="{color}" stroke-width="2"/>'
