"""Writes what a job measures to `metrics.jsonl`, `histograms.jsonl` and wandb, and shows it on the console."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from distill.config import units
from distill.config.schema import ConsoleMode, TrackingConfig, WandbMode
from distill.config.terminal import Progress
from distill.tracking import jsonl
from distill.tracking.wandb_sink import WandbSink

METRICS, HISTOGRAMS = "metrics.jsonl", "histograms.jsonl"


class Tracker:
    """Sinks of one run folder. Use it as a context manager, or call `close` whatever happens.

    enabled: true on rank 0 only; elsewhere every method does nothing and no file is opened.
    run_config: the resolved configuration, plain values (wandb keeps it).
    resume_steps: None starts new files. Otherwise the step of each job in the checkpoint from which the run is
    resumed: later rows are dropped, so are torn lines and rows of jobs without a step (they start again), and the run
    ends with each row exactly once.
    Raises UserError where wandb cannot start.
    """

    def __init__(
        self,
        folder: Path,
        config: TrackingConfig,
        run_config: Mapping[str, Any],
        *,
        enabled: bool = True,
        resume_steps: Mapping[str, int] | None = None,
    ):
        self._config = config
        self._enabled = enabled
        self._mode = config.console if enabled else ConsoleMode.off
        self._progress = Progress(units.tokens, mode=self._mode)
        self._wandb: WandbSink | None = None
        self._warned: set[tuple[str, str]] = set()
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        keep = None if resume_steps is None else partial(_up_to, resume_steps)
        self._metrics = jsonl.JsonLines(folder / METRICS, keep)
        self._histograms = jsonl.JsonLines(folder / HISTOGRAMS, keep)
        self._since = _rows_since_histogram(folder)
        if config.wandb is not WandbMode.off:
            self._wandb = WandbSink(folder, config, run_config, resume=resume_steps is not None)

    def log(
        self,
        job: str,
        step: int,
        metrics: Mapping[str, float],
        histograms: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Record one row of a job at a step.

        metrics: name -> number; a number that is not finite becomes null, with one warning per name and job.
        histograms: name -> counts of equal bins over [0, 1]; kept for every `tracking.histogram_every`-th row, the
        first included, so hand over what there is.
        """
        if not self._enabled:
            return
        assert not metrics.keys() & {"job", "step"}, "job and step are not metrics"
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        for name in (name for name, value in row.items() if value is None and (job, name) not in self._warned):
            self._warned.add((job, name))
            self._warn(f"{job} step {step}: {name} is {metrics[name]}; recorded as null")
        self._metrics.write({"job": job, "step": step, **row})
        kept = dict(histograms or {}) if self._since.get(job, math.inf) >= self._config.histogram_every else {}
        for name, counts in kept.items():
            line = {"job": job, "step": step, "name": name, "low": 0.0, "high": 1.0, "counts": list(counts)}
            self._histograms.write(line)
        if kept:
            self._since[job] = 0
        if job in self._since:
            self._since[job] += 1
        if self._wandb is not None:
            finite = {name: value for name, value in row.items() if value is not None}
            if problem := self._wandb.log(job, step, finite, kept):
                self._warn(f"wandb stopped at {job} step {step}: {problem}; the run goes on without it")
                self._wandb = None

    def progress(self, job: str, step: int, total: int, *, tokens: int, text: str = "") -> None:
        """Show how far a job is: steps done of all, `tokens` of the steps since its previous call, a short text.

        Cheap enough for every step. Speed is that of the job's own turns; the time left covers all jobs begun.
        """
        if self._enabled:
            self._progress.update(job, step, total, amount=tokens, text=text)

    def message(self, text: str) -> None:
        """Print text for good on stdout, above the live line; nothing with console=off.

        Progress and warnings go to stderr, so that `> result.txt` keeps messages and shows progress.
        """
        if self._mode is not ConsoleMode.off:
            self._progress.print(text, sys.stdout)

    def close(self) -> None:
        """Flush and close every file and wandb; only `message` works afterwards. A second call does nothing."""
        self._progress.close()
        if not self._enabled:
            return
        self._enabled = False
        self._metrics.close()
        self._histograms.close()
        if self._wandb is not None and (problem := self._wandb.close()):
            self._warn(f"wandb did not finish: {problem}")

    def _warn(self, text: str) -> None:
        self._progress.print(f"warning: {text}")

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _up_to(steps: Mapping[str, int], row: jsonl.Row) -> bool:
    job, step = row.get("job"), row.get("step")
    return isinstance(job, str) and isinstance(step, int) and step <= steps.get(job, -1)


def _rows_since_histogram(folder: Path) -> dict[str, int]:
    """Rows of each job from its last histogram on, so that a resumed run writes histograms where it would have."""
    last = {row["job"]: row["step"] for row in jsonl.read(folder / HISTOGRAMS)}
    rows = Counter(row["job"] for row in jsonl.read(folder / METRICS) if row["step"] >= last.get(row["job"], math.inf))
    return dict(rows)
