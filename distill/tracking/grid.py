"""A grid of shares as an SVG figure: colour and number in every cell, columns by one quantity, rows by another."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from distill.config.units import percent
from distill.tracking.charts import Frame


def grid(
    frame: Frame, columns: Sequence[str], rows: Sequence[str], shares: Sequence[Sequence[float]], border: int, said: str
) -> str:
    """Cells by row, then column.

    Args:
        frame: its unit names the rows, its x_unit the columns.
        shares: [rows][columns], 0 to 1.
        border: a line stands before this column, if there are columns on both sides; `said` is written at it.
    """
    width, height = 100 / len(columns), 100 / len(rows)
    parts = []
    for y, (row, values) in enumerate(zip(rows, shares, strict=True)):
        middle = f"{(y + 0.5) * height:.2f}%"
        parts.append(f'<text class="y" x="0" y="{middle}" dx="-8">{escape(row)}</text>')
        for x, share in enumerate(values):
            parts.append(
                f'<rect x="{x * width:.2f}%" y="{y * height:.2f}%" width="{width:.2f}%" height="{height:.2f}%" '
                f'fill-opacity="{share:.2f}"/><text class="cell{" on" if share > 0.55 else ""}" '
                f'x="{(x + 0.5) * width:.2f}%" y="{middle}">{percent(share)}</text>'
            )
    for x, column in enumerate(columns):
        parts.append(f'<text class="x" x="{(x + 0.5) * width:.2f}%" y="100%" dy="18">{escape(column)}</text>')
    if 0 < border < len(columns):
        at = f"{border * width:.2f}%"
        parts.append(f'<line class="border strong" x1="{at}" x2="{at}" y1="0" y2="100%"/>')
        parts.append(f'<text class="border" x="{at}" y="0" dx="6" dy="-6">{escape(said)}</text>')
    note = f"<p>{escape(frame.note)}</p>" if frame.note else ""
    return (
        f'<figure class="{"chart wide" if frame.wide else "chart"}"><figcaption><h3>{escape(frame.title)} '
        f"<small>{escape(frame.unit)}</small></h3>{note}</figcaption>"
        f'<div class="plot matrix" style="--rows:{len(rows)}"><svg role="img" aria-label="{escape(frame.title)}">'
        f'{"".join(parts)}</svg></div><p class="x-unit">{escape(frame.x_unit)}</p></figure>\n'
    )
