"""`report.html`: what a run was and how it came out, in one file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from distill.config.files import write_text
from distill.tracking import charts, length, table
from distill.tracking.page import page
from distill.tracking.runs import Arm, RunData, load


@dataclass(frozen=True)
class Panel:
    """One metric of every arm that has it."""

    metric: str
    title: str
    unit: str
    note: str = ""
    smoothed: bool = True
    zero: bool = False
    wide: bool = False


NATS = "nats per token"
SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Held-out loss": (
        Panel("heldout_loss", "Loss on held-out text", NATS, smoothed=False, wide=True),
    ),
    "Training loss": (
        Panel("loss", "Training loss", NATS, "What is minimised: for students a mix of the hard and the soft loss."),
        Panel("hard_loss", "Hard loss", NATS, "Cross-entropy with the next token."),
        Panel("soft_loss", "Soft loss", NATS, "Cross-entropy with the teacher's soft targets."),
        Panel("student_loss", "Student's running loss", NATS, "What the lag of a target is measured against."),
        Panel("teacher_loss", "Teacher's loss at capture", NATS, "Of the shards that the student reads."),
    ),
    "Weighting and targets": (
        Panel("alpha", "Mean alpha", "share of the soft term", zero=True),
        Panel("lag", "Lag", "nats", "How much worse than at its best the teacher was on these targets.", zero=True),
        Panel("lag_factor", "Lag factor", "1: as good as the best targets", "What the lag leaves of alpha.", zero=True),
        Panel("coverage", "Coverage", "share of tokens with targets", smoothed=False, zero=True),
        Panel("stall", "Waiting for data", "share of the time", smoothed=False, zero=True),
        Panel("agreement", "Agreement", "share of tokens", "Student's and teacher's first choice are the same."),
        Panel("mass", "Mass of stored targets", "1 on average", "Sampled codecs keep it at 1 in expectation."),
        Panel("bytes_per_token", "Size of the cache", "bytes per token", smoothed=False, zero=True),
    ),
    "Experts": (
        Panel("expert_entropy", "Entropy of the expert load", "", "Highest when all experts are equally busy."),
        Panel("expert_max_load", "Busiest expert", "times the mean load"),
        Panel("dead_experts", "Idle experts", "count", smoothed=False, zero=True),
        Panel("balance_loss", "Sequence balance loss", "mean over layers", "1 where each sequence is spread evenly."),
        Panel("z_loss", "Router z-loss", "mean over layers", "Squared log-sum-exp of the router's logits.", zero=True),
    ),
    "Optimiser and speed": (
        Panel("lr", "Learning rate", "", smoothed=False, zero=True),
        Panel("grad_norm", "Gradient norm", "before clipping", zero=True),
        Panel("tokens_per_second", "Speed", "tokens per second", zero=True),
        Panel("capture_seconds", "Time in capture", "seconds per micro-batch", zero=True),
    ),
}  # fmt: skip


def write(folder: Path) -> Path:
    """Write `report.html` into a run folder from its own files and those of `arms/<name>/`; returns its path.

    Whatever is missing or torn is left out. The page loads nothing, and appears whole or not at all.
    """
    data = load(folder)
    body = _header(data) + _result(data) + length.section(data) + _charts(data.arms) + _configs(data.configs)
    path = folder / "report.html"
    write_text(path, page(f"{data.name} · codistill", body))
    return path


def _header(data: RunData) -> str:
    kind = f"{data.summary.get('job', '')} run".strip()
    return f"<header><h1>{escape(data.name)}</h1><p>{escape(kind)}</p></header>\n"


def _result(data: RunData) -> str:
    summary = {name: value for name, value in data.summary.items() if name != "job"}
    if not summary:
        text = "This run has not finished." if data.arms else "This run has not measured anything."
        return f'<p class="verdict">{text}</p>\n'
    verdict, rows = table.sentence(summary), table.arms(summary)
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in table.facts(summary))
    parts = [f'<p class="verdict">{escape(verdict)}</p>\n' if verdict else ""]
    parts.append(_table(rows, {arm.label: arm.style for arm in data.arms}) if rows else "")
    parts.append(f"<dl>{facts}</dl>\n" if facts else "")
    return "".join(parts)


def _table(rows: Sequence[dict[str, object]], styles: dict[str, int]) -> str:
    hard = next((float(str(row["loss"])) for row in rows if row["arm"] == "hard"), None)
    accurate = any("accuracy" in row for row in rows)
    lines = []
    for row in rows:
        name = str(row["arm"])
        loss, difference, closed, accuracy = table.figures(row, hard)
        last = f"<td>{accuracy}</td>" if accurate else ""
        style = f"s{styles.get(name, 0) % charts.STYLES}"
        bar = ""
        if closed:
            width = 100 * min(max(float(str(row["gap_closed"])), 0.0), 1.0)
            bar = f'<span class="share"><i class="{style}" style="width:{width:.1f}%"></i></span>'
        lines.append(
            f'<tr{" class=lead" if name == "distilled" else ""}><td><i class="swatch {style}"></i>{escape(name)}</td>'
            f"<td>{loss}</td><td>{difference}</td><td>{closed}{bar}</td>{last}</tr>"
        )
    heads: tuple[str, ...] = ("arm", f"held-out loss, {NATS}", "against hard labels" if hard is not None else "", "")
    if any("gap_closed" in row for row in rows):
        heads = (*heads[:3], "gap to the teacher closed")
    if accurate:
        heads = (*heads, "accuracy")
    head = "".join(f"<th>{text}</th>" for text in heads)
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>\n'


def _charts(arms: list[Arm]) -> str:
    # One unit for every chart: tokens where all arms know theirs, else steps.
    tokens = bool(arms) and all(arm.knows_tokens for arm in arms)
    known = {panel.metric for panels in SECTIONS.values() for panel in panels} | {"tokens"}
    others = sorted({name for arm in arms for name in arm.metrics} - known)
    sections = {**SECTIONS, "Further metrics": tuple(Panel(name, name.replace("_", " "), "") for name in others)}
    html = []
    for title, panels in sections.items():
        figures = ""
        for panel in panels:
            figures += _panel(panel, arms, tokens)
            if panel.metric == "alpha":
                figures += "".join(_heat_maps(arms, tokens))
        if figures:
            html.append(f'<section><h2>{title}</h2><div class="grid">\n{figures}</div></section>\n')
    return "".join(html)


def _panel(panel: Panel, arms: list[Arm], tokens: bool) -> str:
    curves = [_curve(arm, panel.metric, tokens) for arm in arms if panel.metric in arm.metrics]
    if not any(len(curve.x) > 1 for curve in curves):
        return ""
    frame = charts.Frame(panel.title, panel.unit, _x_unit(tokens), panel.note, panel.wide)
    return charts.line_chart(frame, curves, smoothed=panel.smoothed, zero=panel.zero)


def _heat_maps(arms: list[Arm], tokens: bool) -> list[str]:
    found = []
    for arm in arms:
        for name, by_step in sorted(arm.histograms.items()):
            steps = np.array(sorted(step for step in by_step if step > 0), dtype=float)
            if len(steps) < 2 or len({len(counts) for counts in by_step.values()}) > 1:
                continue
            x = arm.tokens(steps) if tokens else steps
            mean = _curve(arm, name, tokens) if name in arm.metrics else None
            frame = charts.Frame(f"{name.capitalize()} over time", f"{name}, all tokens", _x_unit(tokens))
            found.append(charts.heat_map(frame, arm.label, x, np.stack([by_step[int(s)] for s in steps]), mean))
    return found


def _curve(arm: Arm, metric: str, tokens: bool) -> charts.Curve:
    steps, values = arm.metrics[metric]
    return charts.Curve(arm.label, arm.style, arm.tokens(steps) if tokens else steps, values)


def _x_unit(tokens: bool) -> str:
    return "tokens" if tokens else "steps"


def _configs(configs: dict[str, str]) -> str:
    if not configs:
        return ""
    blocks = []
    for name, text in configs.items():
        title = f"Arm {escape(name)}" if name else "This run"
        blocks.append(f"<details><summary>{title}</summary><pre>{escape(text)}</pre></details>\n")
    return f"<section><h2>Resolved configuration</h2>\n{''.join(blocks)}</section>\n"
