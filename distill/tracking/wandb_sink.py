"""Sends metrics and histograms to wandb; the only file that imports it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.config.errors import UserError
from distill.config.files import write_text
from distill.config.schema import TrackingConfig, WandbMode


class WandbSink:
    """One wandb run, kept under the run folder; metrics are `<job>/<name>` over `<job>/step`.

    resume: the run continues under the id that is kept in the folder. Raises UserError where wandb cannot start; later
    failures of wandb are returned as text, and do not end the run.
    """

    def __init__(self, folder: Path, config: TrackingConfig, run_config: Mapping[str, Any], *, resume: bool):
        # wandb's reports of its own crashes are a network call even offline; it must be set before wandb starts.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        id_file = folder / "wandb" / "run_id"
        id_file.parent.mkdir(exist_ok=True)
        # Else its service writes logs to the home folder, or where there is none to our stderr.
        os.environ.setdefault("WANDB_CACHE_DIR", str(id_file.parent.resolve() / "cache"))
        run_id = id_file.read_text().strip() if resume and id_file.is_file() else None
        online = config.wandb is WandbMode.online
        try:
            import wandb

            self._run = wandb.init(
                project=config.project,
                name=_name(folder, config),
                group=_root(folder).name,
                dir=folder,
                config=dict(run_config),
                mode="online" if online else "offline",
                id=run_id,
                resume="allow" if online and run_id else None,
                # An arm's run is open beside its parent's.
                reinit="create_new",
                settings=wandb.Settings(silent=True, console="off", save_code=False, disable_git=True),
            )
        except Exception as error:
            text = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"tracking.wandb={config.wandb.value}: wandb could not start: {text} (off and offline need no account)"
            ) from error
        self._histogram = wandb.Histogram
        self._jobs: set[str] = set()
        write_text(id_file, self._run.id + "\n")

    def log(
        self, job: str, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Sequence[float]]
    ) -> str | None:
        """Record finite metrics and counts over [0, 1]; returns the error as text, or None."""
        try:
            if job not in self._jobs:
                self._jobs.add(job)
                self._run.define_metric(f"{job}/step", hidden=True)
                self._run.define_metric(f"{job}/*", step_metric=f"{job}/step")
            row: dict[str, Any] = {f"{job}/{name}": value for name, value in metrics.items()}
            for name, counts in histograms.items():
                bins = np.asarray(counts), np.linspace(0.0, 1.0, len(counts) + 1)
                # A name of its own: the mean of the same quantity is a metric too.
                row[f"{job}/{name}_histogram"] = self._histogram(np_histogram=bins)
            self._run.log({f"{job}/step": step, **row})
        except Exception as error:
            return str(error) or type(error).__name__
        return None

    def close(self) -> str | None:
        """Finish the run; returns the error as text, or None."""
        try:
            self._run.finish()
        except Exception as error:
            return str(error) or type(error).__name__
        return None


def _root(folder: Path) -> Path:
    """The run folder that an arm (`<run>/arms/<name>`) belongs to, or the folder itself."""
    folder = folder.resolve()
    return folder.parent.parent if folder.parent.name == "arms" else folder


def _name(folder: Path, config: TrackingConfig) -> str:
    root = _root(folder)
    name = config.name or root.name
    return name if root == folder.resolve() else f"{name}/{folder.name}"
