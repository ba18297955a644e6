"""The report's charts of length: loss by position within the document, and the needle in a haystack."""

from typing import Any

import numpy as np

from distill.config.units import percent
from distill.tracking.charts import Curve, Frame, grid, line_chart

BORDERS = 8
"""Most chunk borders that are marked."""


def charts(summary: dict[str, Any]) -> str:
    """HTML; "" where the summary has nothing of the kind, or nothing that is sound."""
    drawn = ""
    for name, draw in (("loss_by_position", _loss), ("needle", _needle)):
        try:
            drawn += draw(summary[name])
        except (LookupError, TypeError, ValueError):
            continue
    return drawn


def _loss(entry: dict[str, Any]) -> str:
    # Positions count from 1 here, since a logarithmic axis has no 0; a bin is drawn at its middle.
    first, last, loss = (np.array(entry[name], dtype=float) for name in ("first", "last", "loss"))
    if len(loss) < 2:
        return ""
    end, chunk, trained = float(last[-1] + 1), entry["chunk_size"], entry["trained_tokens"]
    borders = [border + 1.0 for border in range(chunk, int(end), chunk)][:BORDERS] if chunk else []
    note = "What a token costs by how many tokens of its document are before it."
    if borders:
        note += " Dotted lines: chunk borders."
    if trained < end:
        note += f" Solid line: length of the training samples, {trained:,} tokens."
    solid = [trained + 1.0] if trained < end else []
    frame = Frame("Loss by position", "nats per token", "position in the document", note, wide=True)
    curve = Curve("held-out loss", 2, np.sqrt((first + 1) * (last + 1)), loss, has_value=False)
    return line_chart(frame, [curve], smoothed=False, zero=False, log_x=True, dotted=borders, solid=solid)


def _needle(entry: dict[str, Any]) -> str:
    lengths, depths, trained = entry["lengths"], entry["depths"], entry["trained_tokens"]
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    facts, chunk = entry["facts"], entry["chunk_size"]
    note = f"{entry['trials']} texts a cell; " + (f"{facts} facts in each, one asked for" if facts > 1 else "one fact")
    note += f"; layers with positions attend to {chunk:,} tokens at a time." if chunk else "."
    inside = sum(length <= trained for length in lengths)
    if 0 < inside < len(lengths):
        note += f" Right of the line: beyond the trained length, {trained:,}."
    return grid(
        Frame("Needle in a haystack", "needles found, by their depth", "tokens of the text", note, wide=True),
        [f"{lengths[i]:,}" for i in order],
        [percent(depth) for depth in depths],
        [[entry["accuracy"][i][row] for i in order] for row in range(len(depths))],
        inside,
    )
