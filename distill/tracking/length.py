"""The report's pictures of length: loss by position within the document, and the needle in a haystack."""

from __future__ import annotations

from typing import Any

import numpy as np

from distill.config.units import percent
from distill.tracking.charts import Curve, Frame, Mark, line_chart
from distill.tracking.grid import grid
from distill.tracking.runs import RunData

BORDERS = 8
"""Most chunk borders that are marked."""


def section(data: RunData) -> str:
    """HTML; "" where the summary has nothing of the kind, or nothing that is sound."""
    figures = ""
    for name, draw in (("loss_by_position", _loss), ("needle", _needle)):
        try:
            figures += draw(data.summary[name])
        except (LookupError, TypeError, ValueError):
            continue
    return f'<section><h2>Length</h2><div class="grid">\n{figures}</div></section>\n' if figures else ""


def _loss(found: dict[str, Any]) -> str:
    # Positions count from 1 here, since a logarithmic axis has no 0; a bin stands at its middle.
    first, last, loss = (np.array(found[name], dtype=float) for name in ("first", "last", "loss"))
    if len(loss) < 2:
        return ""
    end, chunk, trained = float(last[-1] + 1), found["chunk_size"], found["trained_tokens"]
    borders = range(chunk, int(end), chunk)[:BORDERS] if chunk else range(0)
    marks = [Mark(float(border + 1), "" if i else "chunk borders") for i, border in enumerate(borders)]
    note = "What a token costs by how many of its document stand before it."
    if trained < end:
        marks.append(Mark(float(trained + 1), "trained length", strong=True))
        note += f" Trained on samples of {trained:,} tokens."
    frame = Frame("Loss by position", "nats per token", "position in the document", note, wide=True)
    curve = Curve("held-out loss", 2, np.sqrt((first + 1) * (last + 1)), loss)
    return line_chart(frame, [curve], smoothed=False, zero=False, log_x=True, marks=marks)


def _needle(found: dict[str, Any]) -> str:
    lengths, depths, trained = found["lengths"], found["depths"], found["trained_tokens"]
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    facts = found["facts"]
    note = f"{found['trials']} texts a cell; " + (f"{facts} facts in each, one asked for" if facts > 1 else "one fact")
    chunk = found["chunk_size"]
    note += f"; layers with positions see {chunk:,} tokens at a time." if chunk else "."
    return grid(
        Frame("Needle in a haystack", "found, by depth of the needle", "tokens of the text", note, wide=True),
        [f"{lengths[i]:,}" for i in order],
        [percent(depth) for depth in depths],
        [[found["accuracy"][i][row] for i in order] for row in range(len(depths))],
        sum(length <= trained for length in lengths),
        f"beyond the trained length, {trained:,}",
    )
