"""The result in words, rows and figures; the console prints it, the report shows the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from distill.config.terminal import text_table
from distill.config.units import duration, file_size, percent, short


def render(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] | None = None) -> str:
    """Plain text within 80 columns: one sentence, one line per arm, and the facts of the run.

    summary: what `summary.json` holds: `<arm>_loss` (nats per token), `<arm>_accuracy`, `gap_closed`,
    `capture_overhead`, `coverage`, `stall` (shares), `bytes_per_token`, `seconds`; whatever is missing is left out.
    rows: `{"arm": name, "loss": nats, "gap_closed": share, "accuracy": share}`, the last two where they apply; None
    takes them from the summary.
    """
    rows = arms(summary) if rows is None else rows
    hard = next((row["loss"] for row in rows if row["arm"] == "hard"), None)
    header = ("arm", "held-out loss\nnats per token", "against hard\nnats per token", "gap closed", "accuracy")
    cells = [(str(row["arm"])[:24], *figures(row, hard)) for row in rows]
    shown = [i for i in range(5) if i < 2 or any(line[i] for line in cells)]
    lines = text_table([[line[i] for i in shown] for line in cells], [header[i] for i in shown]) if rows else []
    known = facts(summary)
    width = max((len(name) for name, _ in known), default=0)
    parts = [sentence(summary), "\n".join(lines)]
    parts.append("\n".join(f"{name:<{width}}  {text}" for name, text in known))
    return "\n\n".join(part for part in parts if part)


def arms(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows for `render` from the `<arm>_loss` and `<arm>_accuracy` keys of a summary, in its order."""
    losses = {
        name.removesuffix("_loss"): value
        for name, value in summary.items()
        if name.endswith("_loss") and name != "heldout_loss" and _is_number(value)
    }
    rows: list[dict[str, Any]] = [{"arm": arm, "loss": loss} for arm, loss in losses.items()]
    gap = losses.get("hard", math.nan) - losses.get("teacher", math.nan)
    for row in rows:
        if row["arm"] not in ("hard", "teacher") and gap > 0:
            row["gap_closed"] = (losses["hard"] - row["loss"]) / gap
        if _is_number(accuracy := summary.get(f"{row['arm']}_accuracy")):
            row["accuracy"] = accuracy
    return rows


def figures(row: Mapping[str, Any], hard: float | None) -> tuple[str, str, str, str]:
    """Loss, difference to hard labels, share of the gap closed and accuracy, as text; "" for what does not apply."""
    difference = "" if hard is None or row["arm"] == "hard" else f"{row['loss'] - hard:+.3f}".replace("-", "−")
    closed, accuracy = ("" if row.get(name) is None else percent(row[name]) for name in ("gap_closed", "accuracy"))
    return f"{row['loss']:.3f}", difference, closed, accuracy


def sentence(summary: Mapping[str, Any]) -> str:
    """One sentence that says how the run came out; "" where the summary has no loss to speak of."""
    rows = {row["arm"]: row for row in arms(summary)}
    if {"teacher", "hard", "distilled"} <= rows.keys():
        gap = rows["hard"]["loss"] - rows["teacher"]["loss"]
        if gap <= 0:
            return f"The teacher is no better than hard labels ({-gap:+.3f} nats): there is no gap to close."
        closed = float(rows["distilled"]["gap_closed"])
        if closed < 0:
            return f"Distillation did harm: {-closed * gap:.3f} nats worse than hard labels."
        if closed > 1:
            return f"The student overtook its teacher: distillation closed {percent(closed)} of the gap."
        return f"Distillation closed {percent(closed)} of the gap between hard labels and the teacher."
    if len(rows) == 1:
        ((arm, row),) = rows.items()
        return f"The {arm} ended at {row['loss']:.3f} nats per token on held-out text."
    if _is_number(loss := summary.get("heldout_loss")):
        return f"{loss:.3f} nats per token on held-out text."
    return ""


def facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values, with units, of everything in a summary that is not in the table; nested names are dotted."""
    found = []
    tabled = {"gap_closed", *(f"{row['arm']}_{figure}" for row in arms(summary) for figure in ("loss", "accuracy"))}
    for name, value in _flat({name: value for name, value in summary.items() if name not in _DRAWN | tabled}):
        label, unit = _FACTS.get(name, (name.replace("_", " "), _plain))
        if value is not None and "_corpora." not in name:
            found.append((label, unit(value) if _is_number(value) else str(value)))
    return found


def _plain(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


_DRAWN = {"needle", "loss_by_position"}
"""Entries of a summary that are pictures."""
_FACTS = {
    "heldout_loss": ("held-out loss", lambda value: f"{value:.3f} nats per token"),
    "bytes_per_token": ("cache", lambda value: f"{value:.1f} bytes per token"),
    "capture_overhead": ("capture overhead", lambda value: f"{percent(value)} of the teacher's step"),
    "coverage": ("coverage", lambda value: f"{percent(value)} of the student's tokens"),
    "stall": ("waiting for data", lambda value: f"{100 * value:.1f} % of the student's time"),
    "agreement": ("agreement", lambda value: f"{percent(value)} of the tokens"),
    "accuracy": ("accuracy", lambda value: f"{percent(value)} of the tokens"),
    "ece": ("calibration error", percent),
    "needle_accuracy": ("needles found", lambda value: f"{percent(value)} within the trained length"),
    "needle_accuracy_across_chunks": ("across chunks", lambda value: f"{percent(value)} of the needles"),
    "tokens": ("tokens", short),
    "flops.captured_tokens": ("captured", lambda value: f"{short(value)} tokens"),
    "flops.saved_tflops": ("capture saved", lambda value: f"{value:.3g} TFLOP of a labelling pass"),
    "flops.training_tflops": ("teacher's training", lambda value: f"{value:.3g} TFLOP"),
    "flops.backfilled_tokens": ("backfilled", lambda value: f"{short(value)} tokens"),
    "flops.backfill_tflops": ("backfill cost", lambda value: f"{value:.3g} TFLOP"),
    "flops.imported_tokens": ("imported", lambda value: f"{short(value)} tokens"),
    "flops.unpriced_tokens": ("of unknown cost", lambda value: f"{short(value)} tokens"),
    "planned_tflops": ("planned", lambda value: f"{value:.3g} TFLOP"),
    "planned_bytes": ("size of it", file_size),
    "planned_seconds": ("time for it", duration),
    "loss": ("teacher's loss", lambda value: f"{value:.3f} nats per token labelled"),
    "seconds": ("wall time", duration),
}


def _flat(summary: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in summary.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
