"""Reads back what a run folder and the arms below it measured, as curves."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill.tracking import jsonl
from distill.tracking.tracker import HISTOGRAMS, METRICS


class Series(NamedTuple):
    """One metric of one job."""

    steps: np.ndarray
    """[N], ascending."""
    values: np.ndarray
    """[N], finite."""


@dataclass
class Arm:
    """One model in training: its metrics by name, and its histograms by name and step."""

    label: str
    below: bool
    """Of a folder below the run's."""
    style: int = 0
    """Index of its color, the same in every chart."""
    metrics: dict[str, Series] = field(default_factory=dict)
    histograms: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)
    finals: dict[str, float] = field(default_factory=dict)
    """Metrics that were measured once more at the end, in another way than along the run; by name."""

    @property
    def last_step(self) -> float:
        return max(float(series.steps[-1]) for series in self.metrics.values())

    def places(self, steps: np.ndarray, unit: str) -> np.ndarray:
        """Steps [N] on an axis of `steps`, or of the `tokens` trained on: on a straight line between logged rows."""
        if unit == "steps":
            return steps
        logged = self.metrics["tokens"]
        return np.interp(steps, np.concatenate([[0], logged.steps]), np.concatenate([[0], logged.values]))


@dataclass
class RunData:
    """A run folder: arms in the order of their colors, its summary, and its configurations by name as yaml text."""

    name: str
    arms: list[Arm]
    summary: dict[str, Any]
    configs: dict[str, str]
    """The run's own has the name ""."""


def load(folder: Path) -> RunData:
    """Load a run folder and `arms/<name>/` below it; files may be missing, and may end in the middle of a line."""
    arms = _arms(folder, None)
    configs = {"": _text(folder / "config.yaml")}
    for below in sorted(path for path in folder.glob("arms/*") if path.is_dir()):
        arms += _arms(below, below.name)
        configs[below.name] = _text(below / "config.yaml")
    summary = _summary(folder)
    order = {name: place for place, name in enumerate(summary)}
    # The teacher first, then the student, then arms as the summary has them.
    arms.sort(key=lambda arm: (arm.label != "teacher", arm.below, order.get(f"{arm.label}_loss", len(order))))
    first = 0 if arms and arms[0].label == "teacher" else 1
    for style, arm in enumerate(arms, start=first):
        arm.style = style
        arm.finals = dict(_finals(summary, arm.label))
    return RunData(folder.resolve().name, arms, summary, {name: text for name, text in configs.items() if text})


def _arms(folder: Path, name: str | None) -> list[Arm]:
    values: dict[str, dict[str, dict[int, float]]] = {}
    for row in jsonl.read(folder / METRICS):
        job, step = row.pop("job", None), row.pop("step", None)
        if isinstance(job, str) and isinstance(step, int):
            for metric, value in row.items():
                if is_number(value):
                    values.setdefault(job, {}).setdefault(metric, {})[step] = float(value)
    arms = {
        job: Arm(_label(job, name, list(values)), name is not None, metrics=_series(metrics))
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


def _series(metrics: dict[str, dict[int, float]]) -> dict[str, Series]:
    ordered = {name: sorted(points.items()) for name, points in metrics.items()}
    return {name: Series(*np.array(points, dtype=float).T) for name, points in ordered.items()}


def _finals(summary: dict[str, Any], label: str) -> dict[str, float]:
    """The final evaluation of an arm, under the names that the evaluations along the run have."""
    finals: dict[str, Any] = {"heldout_loss": summary.get(f"{label}_loss")}
    corpora = summary.get(f"{label}_corpora")
    for name, part in corpora.items() if isinstance(corpora, dict) else ():
        finals |= {f"heldout_{metric}/{name}": value for metric, value in part.items()}
    return {name: value for name, value in finals.items() if is_number(value)}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _summary(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads(_text(folder / "summary.json"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
