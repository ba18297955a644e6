"""Charts as HTML figures, drawn by plotly in the reader's browser; the page around them brings plotly's script."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from distill.config.units import percent, short
from distill.tracking import thinning

# Okabe and Ito's palette, which color-blind readers can tell apart; adjusted for contrast on white and on black.
COLORS = ("#808086", "#d55e00", "#1f7fc4", "#009e73", "#b8568f", "#c98a00", "#3a9bd9", "#8f7a5e")
DASHES = ("solid", "solid", "solid", "dash", "dot", "solid", "dash", "dot")
HEAT = [[0.0, "rgba(31,127,196,0)"], [1.0, "rgba(31,127,196,1)"]]
SPIKE = {"spikethickness": 1, "spikecolor": "#808086", "spikedash": "solid"}
"""The line at the pointer."""
SOLID, DOTTED = {"color": "#808086", "width": 2}, {"color": "#808086", "width": 1, "dash": "dot"}
"""Vertical lines."""
COLUMNS = 100
"""Most columns of a heat map."""
POINTS = 1200
"""Most points of the curves of a chart together; of one curve 600."""
VALUE = ",.4~r"
"""Numbers under the pointer: four digits and no exponent."""


@dataclass(frozen=True)
class Curve:
    """x [N] ascending and y [N] of one arm; `style` selects its color."""

    label: str
    style: int
    x: np.ndarray
    y: np.ndarray
    apart: bool = False
    """The last point was measured in another way: it is drawn as a diamond at the end of a dotted line."""
    has_value: bool = True
    """The legend has its last value."""


@dataclass(frozen=True)
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
    dotted: Sequence[float] = (),
    solid: Sequence[float] = (),
) -> str:
    """Curves over one another; smoothed ones have the raw values behind them.

    zero: a linear y axis starts at 0.
    log_x, log_y: logarithmic axes; points that are not positive are left out, and so is a curve that has no others;
    "" where none is left.
    dotted, solid: x of vertical lines, which the frame's note explains.
    """
    positive = [_positive(curve, log_x, log_y) for curve in curves]
    drawn = [curve for curve in positive if len(curve.x)]
    if not drawn:
        return ""
    most = min(600, POINTS // len(drawn))
    points = [(curve.x, curve.y) for curve in drawn]
    figure = go.Figure()
    for curve in reversed(drawn):  # the first arms matter most and are drawn last
        figure.add_traces(list(_traces(curve, smoothed, most, share=frame.unit.startswith("share"))))
    for x in dotted:
        figure.add_vline(x, line=DOTTED)
    for x in solid:
        figure.add_vline(x, line=SOLID)
    header = {"text": f"%{{x:{VALUE}}} {escape(frame.x_unit)}"}
    figure.update_xaxes(
        **_axis(*thinning.x_range(points, log=log_x), log=log_x), hoverformat=VALUE, unifiedhovertitle=header
    )
    low, high = thinning.y_range(points, zero=zero, log=log_y, whole=not smoothed)
    figure.update_yaxes(**_axis(low, high, log=log_y))
    figure.update_layout(hovermode="x unified")
    return html(replace(frame, note=f"{frame.note} {_beyond(points, low, high)}".strip()), figure)


def _beyond(points: list[thinning.Points], low: float, high: float) -> str:
    """A sentence about the points that an axis from `low` to `high` leaves out; "" where there are none."""
    least, most = min(float(y.min()) for _, y in points), max(float(y.max()) for _, y in points)
    reach = [f"up to {_number(most)}"] * (most > high) + [f"down to {_number(least)}"] * (least < low)
    return f"The axis leaves out first steps and spikes, {' and '.join(reach)}." if reach else ""


def heat_map(frame: Frame, label: str, x: np.ndarray, end: float, counts: np.ndarray, mean: Curve | None) -> str:
    """Histograms over time: columns begin at x [C] and the last one ends at `end`; rows are bins of [0, 1].

    counts: [C, bins]. The depth of color goes with the square root of a column's share in a bin.
    mean: a curve drawn over them.
    """
    groups = np.array_split(np.arange(len(x)), min(len(x), COLUMNS))
    shares = np.stack([counts[group].sum(0) / counts[group].sum() for group in groups], axis=1)
    bins = counts.shape[1]
    cell = f"%{{y:.3~f}} ± {0.5 / bins:.3g}<br>%{{customdata:.1f}} % of the tokens"
    figure = go.Figure()
    figure.add_heatmap(
        x=_floats([*(x[group[0]] for group in groups), end]), y=np.linspace(0, 1, bins + 1), z=_floats(np.sqrt(shares)),
        zmin=0, colorscale=HEAT, showscale=False, customdata=_floats(100 * shares), name="",
        hovertemplate=f"{cell}<br>%{{x:{VALUE}}} {escape(frame.x_unit)}",
    )  # fmt: skip
    if mean is not None:
        figure.add_traces(list(_traces(replace(mean, label="mean", style=0), False, 600)))
    figure.update_xaxes(**_axis(0, 1.01 * end, log=False))
    figure.update_yaxes(range=[0, 1])
    note = f"{frame.note} Darkest: {percent(shares.max())} of the tokens.".strip()
    return html(replace(frame, title=f"{frame.title}: {label}", note=note), figure)


def histogram(frame: Frame, edges: Sequence[float], counts: Sequence[int]) -> str:
    """Bars from edge to edge [N + 1], as high as the share of counts [N]."""
    left, right = np.array(edges[:-1], float), np.array(edges[1:], float)
    figure = go.Figure()
    figure.add_bar(
        x=(left + right) / 2, width=right - left, y=np.array(counts) / max(sum(counts), 1),
        customdata=np.stack([left, right], 1), marker={"color": COLORS[2]},
        hovertemplate="%{y:.1%}<br>%{customdata[0]:.4~r} to %{customdata[1]:.4~r}<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(**_axis(float(edges[0]), float(edges[-1]), log=False))
    figure.update_yaxes(rangemode="tozero", tickformat=".0%")
    figure.update_layout(bargap=0.05, showlegend=False)
    return html(frame, figure)


def grid(
    frame: Frame, columns: Sequence[str], rows: Sequence[str], shares: Sequence[Sequence[float]], border: int
) -> str:
    """Cells by row, then column, with color and number.

    Args:
        frame: its unit names the rows, its x_unit the columns.
        shares: [rows][columns], 0 to 1.
        border: a line is drawn before this column, if there are columns on both sides.
    """
    figure = go.Figure()
    figure.add_heatmap(
        x=list(columns), y=list(rows), z=[list(row) for row in shares], zmin=0, zmax=1, showscale=False, xgap=2, ygap=2,
        colorscale=[[0.0, "rgba(31,127,196,0.04)"], [1.0, "rgba(31,127,196,0.6)"]], hoverinfo="skip",
        text=[[percent(share) for share in row] for row in shares], texttemplate="%{text}",
    )  # fmt: skip
    if 0 < border < len(columns):
        figure.add_vline(border - 0.5, line=SOLID)
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return html(frame, figure, height=90 + 40 * len(rows))


def html(frame: Frame, figure: go.Figure, height: int | None = None) -> str:
    """A figure with title, unit, note and unit of x around it; the page draws it, and has the colors of its theme."""
    figure.update_layout(
        template=go.layout.Template(), height=height or (360 if frame.wide else 260), dragmode=False,
        margin={"l": 52, "r": 12, "t": 8, "b": 28}, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "reversed"},
    )  # fmt: skip
    figure.update_xaxes(showgrid=False, zeroline=False, ticks="outside", ticklen=4, tickangle=0, **SPIKE)
    # Nearer to the axis, a 0 and the tick of the axis of x beside it would read as "0,".
    figure.update_yaxes(zeroline=False, automargin=True, ticks="", ticklabelstandoff=6)
    note = f"<p>{escape(frame.note)}</p>" if frame.note else ""
    return (
        f'<figure class="{"chart wide" if frame.wide else "chart"}"><figcaption><h3>{escape(frame.title)} '
        f"<small>{escape(frame.unit)}</small></h3>{note}</figcaption>"
        f'<div class="plot" style="height:{figure.layout.height}px"></div>'
        f'<script type="application/json">{figure.to_json()}</script>'
        f'<p class="x-unit">{escape(frame.x_unit)}</p></figure>\n'
    )


def _traces(curve: Curve, smoothed: bool, most: int, *, share: bool = False) -> Iterator[go.Scatter]:
    """The raw values, the point that is apart, and the curve itself; share: of values in [0, 1]."""
    label, line = escape(curve.label), {"color": COLORS[curve.style % len(COLORS)], "width": 2}
    end = len(curve.x) - curve.apart
    x, y = (thinning.means if smoothed else thinning.extremes)(curve.x[:end], curve.y[:end], most)
    if smoothed and len(y) >= thinning.SMOOTHED:
        raw_x, raw_y = thinning.extremes(curve.x, curve.y, most)
        yield _scatter(label, raw_x, raw_y, mode="lines", line=line | {"width": 1}, opacity=0.25, hoverinfo="skip")
        y = thinning.smooth(y)
    hover = f"%{{y:{VALUE}}}<extra>{label}</extra>"
    if curve.apart:
        dots = {"symbol": "diamond", "size": [0, 10]}
        yield _scatter(
            label, curve.x[-2:], curve.y[-2:], mode="lines+markers", line=line | {"dash": "dot"}, marker=dots,
            hoverinfo=["skip", "all"], hovertemplate=["", hover],
        )  # fmt: skip
    last = float(curve.y[-1] if curve.apart else y[-1])
    number = f"{last:.4f}" if share else _number(last)
    name = f"{label} <b>{number}</b>" if curve.has_value else label
    yield _scatter(
        label, x, y, name=name, showlegend=True, mode="lines+markers" if len(x) <= 40 else "lines", marker={"size": 7},
        line=line | {"dash": DASHES[curve.style % len(DASHES)]}, hovertemplate=hover,
    )  # fmt: skip


def _number(value: float) -> str:
    return short(value) if abs(value) >= 10_000 else f"{value:.{4 if abs(value) >= 0.1 else 3}g}"


def _scatter(group: str, x: np.ndarray, y: np.ndarray, **style: Any) -> go.Scatter:
    return go.Scatter(x=_floats(x), y=_floats(y), legendgroup=group, **({"showlegend": False} | style))


def _floats(values: Any) -> np.ndarray:
    """In four bytes, as which they go into the page."""
    return np.asarray(values, np.float32)


def _axis(low: float, high: float, *, log: bool) -> dict[str, Any]:
    if log:
        ticks = thinning.log_ticks(low, high)
        bounds = [math.log10(low), math.log10(high)]
        return {"type": "log", "range": bounds, "tickvals": list(ticks), "ticktext": list(ticks.values())}
    large = max(abs(low), abs(high)) >= 1
    return {"range": [low, high], "exponentformat": "B" if large else "e", "nticks": 7}


def _positive(curve: Curve, log_x: bool, log_y: bool) -> Curve:
    """The points that have a place on the axes."""
    kept = ((curve.x > 0) | (not log_x)) & ((curve.y > 0) | (not log_y))
    return replace(curve, x=curve.x[kept], y=curve.y[kept])
