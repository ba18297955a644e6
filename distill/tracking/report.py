"""`report.html`: what a run was and how it came out, in one file that needs nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import numpy as np
import yaml

from distill.config.files import write_text
from distill.tracking import charts, length, table
from distill.tracking.page import entry_list, page, share_bar
from distill.tracking.runs import Arm, RunData, load
from distill.tracking.table import NATS


@dataclass(frozen=True)
class Panel:
    """One metric of every arm that has it."""

    metric: str
    title: str
    unit: str = ""
    note: str = ""
    smoothed: bool = True
    zero: bool = False
    wide: bool = False
    off: float = 0.0
    """Value of the metric where what it measures is switched off: a curve of nothing else is not drawn."""


HELD_OUT, WEIGHTING = "Held-out loss", "Weighting and targets"
SECTIONS: dict[str, tuple[Panel, ...]] = {
    HELD_OUT: (Panel("heldout_loss", "Loss on held-out text", NATS, smoothed=False, wide=True),),
    "Training loss": (
        Panel("loss", "Training loss", NATS, "What is minimized: for students a mix of the hard and the soft loss."),
        Panel("hard_loss", "Hard loss", NATS, "Cross-entropy with the next token."),
        Panel("soft_loss", "Soft loss", NATS, "Between the distributions of teacher and student."),
        Panel("teacher_loss", "Teacher's loss", NATS, "Of the labels that the student reads, at capture."),
    ),
    WEIGHTING: (
        Panel("alpha", "Mean alpha", "share of the soft term", zero=True),
        Panel("effective_weight", "Effective weight", "share of the soft gradient", "By norms.", zero=True),
        Panel("teacher_lead", "Teacher's lead", "nats", "Student's less teacher's loss of a label.", zero=True),
        Panel("disagreement", "Disagreement", "nats", "The soft loss above the least it can be.", zero=True),
        Panel("student_place", "Student's place", "nats", "Its loss on the teachers' curves, by the same tokens."),
        Panel("lag", "Lag", "nats", "How much worse than at its end the teacher was on these targets.", zero=True),
        Panel("lag_factor", "Lag factor", "1 for the best targets", "Reduces alpha by the targets' lag.", off=1),
        Panel("hard_grad_norm", "Gradient of the hard loss", "norm at the logits", "Mean over tokens.", zero=True),
        Panel("soft_grad_norm", "Gradient of the soft loss", "norm at the logits", "Mean over tokens.", zero=True),
        Panel("hidden_match", "Hidden states", "1 - cosine", "The student's, projected, and the teacher's.", zero=True),
        Panel("coverage", "Coverage", "share of tokens with targets", smoothed=False, zero=True, off=1),
        Panel("stall", "Waiting for data", "share of the time", smoothed=False, zero=True),
        Panel("agreement", "Agreement", "share of tokens", "Student's and teacher's first choice are the same."),
        Panel("mass", "Mass of stored targets", "1 on average", "Sampled codecs keep it at 1 in expectation.", off=1),
        Panel("bytes_per_token", "Size of the cache", "bytes per token", smoothed=False, zero=True),
    ),
    "Experts": (
        Panel("expert_entropy", "Entropy of the expert load", "", "Highest when all experts are equally busy."),
        Panel("expert_max_load", "Busiest expert", "times the mean load"),
        Panel("dead_experts", "Idle experts", "count", smoothed=False, zero=True),
        Panel("balance_loss", "Sequence balance loss", "mean over layers", "1 where each sequence is spread evenly."),
        Panel("z_loss", "Router z-loss", "mean over layers", "Squared log-sum-exp of the router's logits.", zero=True),
    ),
    "Optimizer and speed": (
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
    body = _header(data) + _result(data) + _section("Length", length.charts(data.summary)) + _curves(data)
    path = folder / "report.html"
    write_text(path, page(f"{data.name} · codistill", body + _configs(data.configs)))
    return path


def _header(data: RunData) -> str:
    kind = f"{data.summary.get('job', '')} run".strip()
    return f"<header><h1>{escape(data.name)}</h1><p>{escape(kind)}</p></header>\n"


def _section(title: str, charts_html: str) -> str:
    return f'<section><h2>{title}</h2><div class="grid">\n{charts_html}</div></section>\n' if charts_html else ""


def _result(data: RunData) -> str:
    summary = {name: value for name, value in data.summary.items() if name != "job"}
    if not summary:
        text = "This run has not finished." if data.arms else "This run has not measured anything."
        return f'<p class="verdict">{text}</p>\n'
    sentence = table.verdict(summary)
    return (
        (f'<p class="verdict">{escape(sentence)}</p>\n' if sentence else "")
        + _table(table.outcomes(summary), {arm.label: arm.style for arm in data.arms})
        + entry_list(table.entries(summary))
    )


def _table(rows: Sequence[table.Outcome], styles: dict[str, int]) -> str:
    if not rows:
        return ""
    heads = (f"held-out loss, {table.NATS}", "against hard labels", "gap to the teacher closed", "accuracy")
    shown = [i for i in range(4) if any(row.cells[i] for row in rows)]
    lines = []
    for row in rows:
        color = charts.COLORS[styles.get(row.arm, 0) % len(charts.COLORS)]
        cells = list(row.cells)
        if row.gap_closed is not None and row.gap_closed > 0:
            cells[2] += share_bar(row.gap_closed, color)
        swatch, lead = f'<i class="swatch" style="background:{color}"></i>', " class=lead" * (row.arm == "distilled")
        values = "".join(f"<td>{cells[i]}</td>" for i in shown)
        lines.append(f"<tr{lead}><td>{swatch}{escape(row.arm)}</td>{values}</tr>")
    head = "".join(f"<th>{heads[i]}</th>" for i in shown)
    return f'<div class="scroll"><table><tr><th>arm</th>{head}</tr>{"".join(lines)}</table></div>\n'


def _curves(data: RunData) -> str:
    # One unit for every chart: tokens where all arms have logged theirs, else steps.
    unit = "tokens" if data.arms and all("tokens" in arm.metrics for arm in data.arms) else "steps"
    html = ""
    for title, panels in _sections(data).items():
        drawn = ""
        for panel in panels:
            drawn += _panel(panel, data.arms, unit)
            if panel.metric == "alpha":
                drawn += "".join(_heat_map(arm, name, unit) for arm in data.arms for name in sorted(arm.histograms))
        html += _section(title, drawn)
    return html


def _sections(data: RunData) -> dict[str, list[Panel]]:
    """All panels: those of SECTIONS, the same of each corpus of a mixture, and one for each metric that is left."""
    sections = {title: list(panels) for title, panels in SECTIONS.items()} | {"Further metrics": []}
    panels = {panel.metric: panel for panels in SECTIONS.values() for panel in panels}
    places = {panel.metric: title for title, panels in SECTIONS.items() for panel in panels}
    for metric in sorted({name for arm in data.arms for name in arm.metrics} - panels.keys() - {"tokens"}):
        name, _, corpus = metric.partition("/")
        if name in panels:
            panel = replace(panels[name], metric=metric, title=f"{panels[name].title}: {corpus}", wide=False)
            sections[places[name]].append(panel)
        elif name == "heldout_accuracy":
            unit = "share of the tokens"
            sections[HELD_OUT].append(Panel(metric, f"Accuracy on held-out text: {corpus}", unit, smoothed=False))
        elif name.endswith("_factor"):
            sections[WEIGHTING].append(Panel(metric, name.replace("_", " ").capitalize(), "mean of a token's", off=1))
        else:
            sections["Further metrics"].append(Panel(metric, metric.replace("_", " ")))
    note = _heldout_note(data)
    sections[HELD_OUT] = [replace(panel, note=note) for panel in sections[HELD_OUT]]
    return sections


def _heldout_note(data: RunData) -> str:
    """On how many samples the points of a held-out curve are."""
    try:
        config = yaml.safe_load(data.configs[""])
        along = sorted({config[role]["train"]["eval_samples"] for role in ("teacher", "student")})
        last = config["evaluate"]["samples"] or "all"
    except (LookupError, TypeError, yaml.YAMLError):
        return ""
    finals = any(arm.finals for arm in data.arms)
    diamond = f" The diamond at the end, as the table: {last} samples." if finals else ""
    return f"Dots: {' or '.join(map(str, along))} held-out samples.{diamond}"


def _panel(panel: Panel, arms: list[Arm], unit: str) -> str:
    curves = [
        _curve(arm, panel.metric, unit)
        for arm in arms
        if panel.metric in arm.metrics
        and not np.allclose(arm.metrics[panel.metric].values, panel.off, rtol=1e-6, atol=0.0)
    ]
    if not any(len(curve.x) > 1 for curve in curves):
        return ""
    frame = charts.Frame(panel.title, panel.unit, unit, panel.note, panel.wide)
    return charts.line_chart(frame, curves, smoothed=panel.smoothed, zero=panel.zero)


def _heat_map(arm: Arm, name: str, unit: str) -> str:
    """Of a metric whose values are not the same all along; "" for others, which a curve shows.

    A histogram is of the steps that end with its own; the mean is drawn from the rows that have one.
    """
    by_step = {step: counts for step, counts in sorted(arm.histograms[name].items()) if step > 0}
    if len(by_step) < 2 or len({len(counts) for counts in by_step.values()}) > 1:
        return ""
    counts = np.stack(list(by_step.values()))
    if (counts > 0).any(0).sum() < 2:
        return ""
    x = arm.places(np.array([0, *by_step], dtype=float), unit)
    mean = None
    if name in arm.metrics:
        curve = _curve(arm, name, unit)
        rows = np.isin(arm.metrics[name].steps, list(by_step))
        mean = replace(curve, x=curve.x[rows], y=curve.y[rows])
    words = name.replace("_", " ")
    frame = charts.Frame(f"{words.capitalize()} over time", f"{words}, all tokens", unit)
    return charts.heat_map(frame, arm.label, x[:-1], x[-1], counts, mean)


def _curve(arm: Arm, metric: str, unit: str) -> charts.Curve:
    steps, values = arm.metrics[metric]
    final = arm.finals.get(metric)
    if final is not None:
        along = steps < arm.last_step
        steps, values = np.append(steps[along], arm.last_step), np.append(values[along], final)
    apart = final is not None and len(steps) > 1
    return charts.Curve(arm.label, arm.style, arm.places(steps, unit), values, apart)


def _configs(configs: dict[str, str]) -> str:
    if not configs:
        return ""
    blocks = []
    for name, text in configs.items():
        title = f"Arm {escape(name)}" if name else "This run"
        blocks.append(f"<details><summary>{title}</summary><pre>{escape(text)}</pre></details>\n")
    return f"<section><h2>Resolved configuration</h2>\n{''.join(blocks)}</section>\n"
