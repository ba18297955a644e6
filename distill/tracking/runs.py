"""What a run folder and the arms below it measured, read back as curves."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distill.tracking import jsonl
from distill.tracking.tracker import HISTOGRAMS, METRICS

Points = tuple[np.ndarray, np.ndarray]
"""Steps [N], ascending, and values [N], finite."""


@dataclass
class Arm:
    """One model in training: its curves by metric name, and its histograms by name and step."""

    label: str
    below: bool
    """Of a folder below the run's."""
    style: int = 0
    """Index of its colour, the same in every chart."""
    metrics: dict[str, Points] = field(default_factory=dict)
    histograms: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)

    @property
    def knows_tokens(self) -> bool:
        return "tokens" in self.metrics

    def tokens(self, steps: np.ndarray) -> np.ndarray:
        """Tokens seen at steps [N]; between logged rows on a straight line."""
        known, tokens = self.metrics["tokens"]
        return np.interp(steps, np.concatenate([[0], known]), np.concatenate([[0], tokens]))


@dataclass
class RunData:
    """A run folder: arms in the order of their colours, its summary, and its configurations by name."""

    name: str
    arms: list[Arm]
    summary: dict[str, Any]
    configs: dict[str, str]


def load(folder: Path) -> RunData:
    """Read a run folder and `arms/<name>/` below it; files may be missing, and may end in the middle of a line."""
    arms = _arms(folder, None)
    configs = {"": _text(folder / "config.yaml")}
    for below in sorted(path for path in folder.glob("arms/*") if path.is_dir()):
        arms += _arms(below, below.name)
        configs[below.name] = _text(below / "config.yaml")
    summary = _summary(folder)
    order = {name: place for place, name in enumerate(summary)}
    # The teacher first, in the colour of text, then the student, then arms as the summary has them.
    arms.sort(key=lambda arm: (arm.label != "teacher", arm.below, order.get(f"{arm.label}_loss", len(order))))
    first = 0 if arms and arms[0].label == "teacher" else 1
    for style, arm in enumerate(arms, start=first):
        arm.style = style
    return RunData(folder.resolve().name, arms, summary, {name: text for name, text in configs.items() if text})


def _arms(folder: Path, name: str | None) -> list[Arm]:
    values: dict[str, dict[str, dict[int, float]]] = {}
    for row in jsonl.read(folder / METRICS):
        job, step = row.pop("job", None), row.pop("step", None)
        if isinstance(job, str) and isinstance(step, int):
            for metric, value in row.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    values.setdefault(job, {}).setdefault(metric, {})[step] = float(value)
    arms = {
        job: Arm(_label(job, name, list(values)), name is not None, metrics=_curves(metrics))
        for job, metrics in values.items()
    }
    for row in jsonl.read(folder / HISTOGRAMS):
        counts = np.asarray(row.get("counts", []), dtype=float)
        if row.get("job") in arms and counts.sum() > 0:
            arms[row["job"]].histograms.setdefault(row["name"], {})[row["step"]] = counts
    return list(arms.values())


def _label(job: str, name: str | None, jobs: list[str]) -> str:
    if name is None:
        return "distilled" if job == "student" and "teacher" in jobs else job
    return name if len(jobs) == 1 else f"{name} {job}"


def _curves(metrics: dict[str, dict[int, float]]) -> dict[str, Points]:
    curves = {}
    for name, points in metrics.items():
        steps = np.array(sorted(points), dtype=float)
        curves[name] = steps, np.array([points[int(step)] for step in steps])
    return curves


def _summary(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(folder / "summary.json"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
