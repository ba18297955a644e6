"""The result of a run: a sentence, a table of arms and the other summary entries; console and report show the same."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from distill.config.terminal import text_table
from distill.config.units import duration, file_size, percent, short, tokens
from distill.config.values import flat
from distill.tracking.runs import is_number

NATS = "nats per token"


class Outcome(NamedTuple):
    """How an arm ended, on held-out text."""

    arm: str
    loss: float
    """Nats per token."""
    against_hard: float | None
    """Nats per token: its loss less that of hard labels; None for hard labels, or without them."""
    gap_closed: float | None
    """Share of the way from hard labels to the teacher; None where there is no gap, and for these two."""
    accuracy: float | None
    """Share of the tokens."""

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """Loss, difference to hard labels, gap closed and accuracy as text; "" for what does not apply."""
        difference = "" if self.against_hard is None else f"{self.against_hard:+.3f}".replace("-", "−")
        closed, accuracy = ("" if share is None else percent(share) for share in (self.gap_closed, self.accuracy))
        return f"{self.loss:.3f}", difference, closed, accuracy


def render(summary: Mapping[str, Any]) -> str:
    """Plain text within 80 columns: one sentence, one line per arm, and the other entries of the summary.

    summary: what `summary.json` holds: `<arm>_loss` (nats per token), `<arm>_accuracy`, `gap_closed`,
    `capture_overhead`, `coverage`, `stall` (shares), `bytes_per_token`, `seconds`; whatever is missing is left out.
    """
    header = ("arm", f"held-out loss\n{NATS}", f"against hard\n{NATS}", "gap closed", "accuracy")
    rows = [(outcome.arm[:24], *outcome.cells) for outcome in outcomes(summary)]
    shown = [i for i in range(5) if i < 2 or any(row[i] for row in rows)]
    lines = text_table([[row[i] for i in shown] for row in rows], [header[i] for i in shown]) if rows else []
    others = entries(summary)
    width = max(map(len, others), default=0)
    parts = [verdict(summary), "\n".join(lines), "\n".join(f"{name:<{width}}  {text}" for name, text in others.items())]
    return "\n\n".join(part for part in parts if part)


def outcomes(summary: Mapping[str, Any]) -> list[Outcome]:
    """The arms of a summary, in its order."""
    losses = {
        name.removesuffix("_loss"): value
        for name, value in summary.items()
        if name.endswith("_loss") and name != "heldout_loss" and is_number(value)
    }
    hard, teacher = losses.get("hard"), losses.get("teacher")
    gap = 0.0 if hard is None or teacher is None else hard - teacher
    rows = []
    for arm, loss in losses.items():
        difference = None if hard is None or arm == "hard" else loss - hard
        closed = None if gap <= 0 or difference is None or arm == "teacher" else -difference / gap
        accuracy = summary.get(f"{arm}_accuracy")
        rows.append(Outcome(arm, loss, difference, closed, accuracy if is_number(accuracy) else None))
    return rows


def verdict(summary: Mapping[str, Any]) -> str:
    """The result in one sentence; "" where the summary has no loss."""
    rows = {row.arm: row for row in outcomes(summary)}
    if {"teacher", "hard", "distilled"} <= rows.keys():
        gap, closed = rows["hard"].loss - rows["teacher"].loss, rows["distilled"].gap_closed
        if closed is None:
            return f"The teacher is no better than hard labels ({-gap:+.3f} nats): there is no gap to close."
        if closed < 0:
            return f"Distillation did harm: {-closed * gap:.3f} nats worse than hard labels."
        if closed > 1:
            return f"The student overtook its teacher: distillation closed {percent(closed)} of the gap."
        return f"Distillation closed {percent(closed)} of the gap between hard labels and the teacher."
    if len(rows) == 1:
        (row,) = rows.values()
        return f"The {row.arm} ended at {row.loss:.3f} {NATS} on held-out text."
    if is_number(loss := summary.get("heldout_loss")):
        return f"{loss:.3f} {NATS} on held-out text."
    return ""


def entries(summary: Mapping[str, Any]) -> dict[str, str]:
    """Label and value, with its unit, of every summary entry that is not in the table; nested names are dotted."""
    tabled = {"gap_closed", *(f"{row.arm}_{metric}" for row in outcomes(summary) for metric in ("loss", "accuracy"))}
    texts = {}
    for name, value in flat({name: value for name, value in summary.items() if name not in _CHARTS | tabled}).items():
        label, unit = _ENTRIES.get(name, (name.replace("_", " "), _plain))
        if value not in (None, {}) and "_corpora." not in name:
            texts[label] = unit(value) if is_number(value) else str(value)
    return texts


def _plain(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _overhead(value: float) -> str:
    noise = "; below 0 is noise of the timing" if value < 0 else ""
    return f"{percent(value)} of the teacher's step{noise}"


def _tflop(value: float) -> str:
    return f"{value:.3g} TFLOP"


_CHARTS = {"needle", "loss_by_position"}
"""Entries of a summary that are drawn."""
_ENTRIES = {
    "heldout_loss": ("held-out loss", lambda value: f"{value:.3f} {NATS}"),
    "bytes_per_token": ("cache", lambda value: f"{value:.1f} bytes per token"),
    "capture_overhead": ("capture overhead", _overhead),
    "coverage": ("coverage", lambda value: f"{percent(value)} of the student's tokens"),
    "stall": ("waiting for data", lambda value: f"{100 * value:.1f} % of the student's time"),
    "agreement": ("agreement", lambda value: f"{percent(value)} of the tokens"),
    "accuracy": ("accuracy", lambda value: f"{percent(value)} of the tokens"),
    "ece": ("calibration error", percent),
    "needle_accuracy": ("needles found", lambda value: f"{percent(value)} within the trained length"),
    "needle_accuracy_across_chunks": ("across chunks", lambda value: f"{percent(value)} of the needles"),
    "tokens": ("tokens", short),
    "flops.captured_tokens": ("captured", tokens),
    "flops.saved_tflops": ("capture saved", lambda value: f"{_tflop(value)} of a labelling pass"),
    "flops.training_tflops": ("teacher's training", _tflop),
    "flops.backfilled_tokens": ("backfilled", tokens),
    "flops.backfill_tflops": ("backfill cost", _tflop),
    "flops.imported_tokens": ("imported", tokens),
    "flops.unpriced_tokens": ("of unknown cost", tokens),
    "planned_tflops": ("planned", _tflop),
    "planned_bytes": ("size of it", file_size),
    "planned_seconds": ("time for it", duration),
    "loss": ("teacher's loss", lambda value: f"{value:.3f} {NATS} labelled"),
    "seconds": ("wall time", duration),
}
