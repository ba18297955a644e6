"""Charts as HTML figures around inline SVG.

Curves live in a stretched square of 1000 units inside an SVG as wide as the page's column, so that a chart fits any
width while its text and strokes keep their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from distill.config.units import percent, short
from distill.tracking import scale
from distill.tracking.scale import Axis

STYLES = 8
COLUMNS = 100
"""Most columns of a heat map."""


@dataclass
class Curve:
    """x [N] ascending and y [N] of one arm; `style` picks its colour."""

    label: str
    style: int
    x: np.ndarray
    y: np.ndarray


@dataclass
class Mark:
    """An upright line at one x; of several alike, the first has the text."""

    x: float
    text: str = ""
    strong: bool = False


@dataclass
class Frame:
    """What surrounds a chart: words and units."""

    title: str
    unit: str
    x_unit: str
    note: str = ""
    wide: bool = False


def line_chart(
    frame: Frame,
    curves: Sequence[Curve],
    *,
    smoothed: bool,
    zero: bool,
    log_x: bool = False,
    log_y: bool = False,
    marks: Sequence[Mark] = (),
) -> str:
    """Curves over one another, each of at most `scale.POINTS` points; smoothed ones have the raw values behind them.

    log_x, log_y: logarithmic axes; points that are not positive are left out, and so is a curve that has no others;
    "" where none is left.
    """
    raw, main, drawn = [], [], []
    for curve in curves:
        points = scale.positive(curve.x, curve.y, log_x, log_y)
        if not len(points[0]):
            continue
        drawn.append(curve)
        x, y = scale.means(*points) if smoothed else scale.extremes(*points)
        shown = scale.smooth(y) if smoothed else y
        main.append((x, shown))
        raw.append(scale.extremes(*points) if shown is not points[1] else None)
    if not drawn:
        return ""
    everything = [*main, *(points for points in raw if points)]
    x_axis = scale.x_axis(main, log=log_x)
    y_axis = scale.y_axis(everything, zero=zero, log=log_y, whole=log_x)
    body = [_polyline("raw", curve, points, x_axis, y_axis) for curve, points in zip(drawn, raw, strict=True) if points]
    # Few points are measurements far apart: show where they are. The first arms matter most and are drawn last.
    body += [
        _polyline("main dots" if len(points[0]) <= 40 else "main", curve, points, x_axis, y_axis)
        for curve, points in reversed(list(zip(drawn, main, strict=True)))
    ]
    width = y_axis.high - y_axis.low
    finals = [_number(last, min(width, last) if log_y else width) for last in (float(y[-1]) for _, y in main)]
    legend = "".join(
        f'<li class="s{curve.style % STYLES}"><i></i>{escape(curve.label)} <b>{final}</b></li>'
        for curve, final in zip(drawn, finals, strict=True)
    )
    return _figure(frame, f'<ul class="legend">{legend}</ul>', "".join(body), x_axis, y_axis, marks)


def heat_map(frame: Frame, label: str, x: np.ndarray, counts: np.ndarray, mean: Curve | None) -> str:
    """Histograms over time: columns end at x [C], rows are the equal bins over [0, 1] of counts [C, bins].

    The depth of colour goes with the square root of a column's share in a bin. mean: a curve drawn over it.
    """
    groups = np.array_split(np.arange(len(x)), min(len(x), COLUMNS))
    ends = [float(x[group[-1]]) for group in groups]
    shares = [counts[group].sum(0) / counts[group].sum() for group in groups]
    right, most = ends[-1] or 1.0, max(float(share.max()) for share in shares)
    bins = counts.shape[1]
    cells, start = [], 0.0
    for end, share in zip(ends, shares, strict=True):
        left = round(1000 * start / right, 1)
        width = round(1000 * end / right, 1) - left
        cells += [
            f'<rect x="{left:.1f}" y="{1000 * (1 - (i + 1) / bins):g}" width="{width:.1f}" height="{1000 / bins:g}" '
            f'fill-opacity="{(part / most) ** 0.5:.2f}" data-share="{percent(part)}" '
            f'data-bin="{i / bins:.2f} to {(i + 1) / bins:.2f}"/>'
            for i, part in enumerate(share)
            if part > 0.0005
        ]
        start = end
    x_axis, y_axis = Axis(0.0, right), Axis(0.0, 1.0)
    body = f'<g class="cells">{"".join(cells)}</g>'
    legend = f'<li class="ramp">0<i></i>{percent(most)} of the tokens</li>'
    if mean is not None:
        points = scale.means(mean.x, mean.y)
        body += _polyline("mean", mean, points, x_axis, y_axis)
        legend += '<li class="line"><i></i>mean</li>'
    title = Frame(f"{frame.title}: {label}", frame.unit, frame.x_unit, frame.note, frame.wide)
    return _figure(title, f'<ul class="legend">{legend}</ul>', body, x_axis, y_axis)


def histogram(frame: Frame, edges: Sequence[float], counts: Sequence[int]) -> str:
    """Bars from edge to edge [N + 1], as high as the share of counts [N]."""
    total = max(sum(counts), 1)
    shares = [count / total for count in counts]
    x_axis, y_axis = Axis(float(edges[0]), float(edges[-1])), Axis(0.0, 1.06 * max(max(shares), 1e-9))
    cells = []
    for low, high, share in zip(edges[:-1], edges[1:], shares, strict=True):
        left, right = 1000 * float(x_axis.share(low)), 1000 * float(x_axis.share(high))
        top = 1000 * (1 - float(y_axis.share(share)))
        cells.append(
            f'<rect x="{left + 2:.1f}" y="{top:.1f}" width="{right - left - 4:.1f}" height="{1000 - top:.1f}" '
            f'fill-opacity="0.8" data-share="{percent(share)}"/>'
        )
    return _figure(frame, "", f'<g class="cells">{"".join(cells)}</g>', x_axis, y_axis)


def _figure(frame: Frame, legend: str, body: str, x_axis: Axis, y_axis: Axis, marks: Sequence[Mark] = ()) -> str:
    axes = []
    for value, text in y_axis.marks():
        at = f"{100 * (1 - y_axis.share(value)):.2f}%"
        axes.append(f'<line x1="0" x2="100%" y1="{at}" y2="{at}"/><text class="y" x="0" y="{at}" dx="-8">{text}</text>')
    for value, text in x_axis.marks():
        at = f"{100 * x_axis.share(value):.2f}%"
        axes.append(f'<line class="tick" x1="{at}" x2="{at}" y1="100%" y2="100%"/>')
        axes.append(f'<text class="x" x="{at}" y="100%" dy="18">{text}</text>')
    for mark in marks:
        at = f"{100 * x_axis.share(mark.x):.2f}%"
        kind = "border strong" if mark.strong else "border"
        axes.append(f'<line class="{kind}" x1="{at}" x2="{at}" y1="0" y2="100%"/>')
        axes.append(
            f'<text class="border" x="{at}" y="0" dx="4" dy="10">{escape(mark.text)}</text>' if mark.text else ""
        )
    note = f"<p>{escape(frame.note)}</p>" if frame.note else ""
    log = "x" * x_axis.log + "y" * y_axis.log
    return (
        f'<figure class="{"chart wide" if frame.wide else "chart"}"><figcaption><h3>{escape(frame.title)} '
        f"<small>{escape(frame.unit)}</small></h3>{note}{legend}</figcaption>"
        f'<div class="plot" data-left="{x_axis.low:.9g}" data-right="{x_axis.high:.9g}" data-low="{y_axis.low:.9g}" '
        f'data-high="{y_axis.high:.9g}" data-log="{log}" data-unit="{escape(frame.x_unit)}">'
        f'<svg role="img" aria-label="{escape(frame.title)}">{"".join(axes)}'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none">{body}</svg></svg></div>'
        f'<p class="x-unit">{escape(frame.x_unit)}</p></figure>\n'
    )


def _polyline(kind: str, curve: Curve, points: tuple[np.ndarray, np.ndarray], x_axis: Axis, y_axis: Axis) -> str:
    x, y = 1000 * x_axis.share(points[0]), 1000 * (1 - y_axis.share(points[1]))
    pairs = [f"{a:.1f},{b:.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    style = f"s{curve.style % STYLES}"
    # A line of no length with round ends is a dot that stays round when the square is stretched.
    dots = "".join(f"M{pair}h0" for pair in pairs) if "dots" in kind else ""
    line = f'<polyline class="{kind} {style}" data-label="{escape(curve.label)}" points="{" ".join(pairs)}"/>'
    return line + (f'<path class="dots {style}" d="{dots}"/>' if dots else "")


def _number(value: float, width: float) -> str:
    """A value with as many digits as tell it from others on an axis `width` long."""
    if abs(value) >= 10_000 or value == 0:
        return short(value)
    digits = max(0, min(6, int(np.ceil(2.3 - np.log10(width)))))
    text = f"{value:.{digits}f}" if width >= 1e-2 else f"{value:.3g}".replace("e-0", "e-")
    return text.replace("-", "−", 1) if text.startswith("-") else text
