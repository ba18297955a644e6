"""The records of a run in its folder: compared with a new start or a resume before anything in it is changed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill.config import paths
from distill.config.errors import ConfigError
from distill.config.files import write_text
from distill.config.load import read_yaml, to_dict, to_yaml
from distill.config.schema import PrecisionConfig, RunConfig
from distill.config.values import differences, shown
from distill.tracking.tracker import METRICS

CONFIG, SUMMARY, CHECKPOINTS = "config.yaml", "summary.json", "checkpoints"

# May differ between a run and its resumption: they change nothing that is computed.
_FREE = (
    "resume",
    "engine.",
    "tracking.",
    "evaluate.",
    "backfill.",
    "lab.",
    "data.dir",
    "cache.dir",
    "cache.dirs",
    "cache.queue",
    "cache.follow",
    "teacher.train.keep_checkpoints",
    "student.train.keep_checkpoints",
)


def record(folder: Path, config: RunConfig) -> None:
    """Writes a run's configuration into its folder."""
    write_text(folder / CONFIG, to_yaml(config))


def recorded(folder: Path) -> dict[str, Any]:
    """The configuration that a run left in its folder; ConfigError: it is not there, or damaged."""
    path = folder / CONFIG
    try:
        found = read_yaml(path)
        if not isinstance(found, dict) or "job" not in found:
            raise ValueError("it is no run's configuration")
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing") from None
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is damaged ({reason:.120})") from error
    if isinstance(found.get("precision"), str):  # as version 0.1 wrote it
        found["precision"] = {**to_dict(PrecisionConfig()), "name": found["precision"]}
    return found


def run_of(path: Path) -> Path | None:
    """The run that a path lies in, at most two levels below its folder, or is."""
    place = path.absolute()
    return next((f for f in (place, *list(place.parents)[:2]) if (f / CONFIG).exists()), None)


def problems(folder: Path, config: RunConfig) -> Iterator[str]:
    """What keeps a run from starting in the folder, or from going on there."""
    left = [name for name in (CONFIG, METRICS, SUMMARY) if (folder / name).exists()]
    left += [CHECKPOINTS] if any((folder / CHECKPOINTS).glob("step-*")) else []
    # Begun, and nothing was measured: the first step was refused, for example because of a plugin.
    was_refused = left == [CONFIG, METRICS] and not (folder / METRICS).stat().st_size
    if not left or (was_refused and not config.resume):
        return
    if not config.resume:
        what = "it holds a run" if CONFIG in left else f"it holds {', '.join(left)} of a run"
        way_out = "set resume=true, or choose another folder" if CONFIG in left else "choose another folder"
        yield f"hydra.run.dir is {folder}; {what}: {way_out}"
        return
    try:
        before = recorded(folder)
    except ConfigError as error:
        yield (
            f"{error}; resume=true compares with it what the run was started with: put it back, or start anew in "
            "another folder"
        )
        return
    was, now = paths.expanded(before, RunConfig), to_dict(config)  # the paths of both whole
    for key, here, there in sorted(differences(now, was), key=lambda difference: difference.key):
        if not key.startswith(_FREE):
            # A field may not have the name of a Python keyword.
            yield f"{key.rstrip('_')} is {shown(here)}; the run in {folder} was started with {shown(there)}"
    if (folder / SUMMARY).exists():
        try:
            summary(folder)
        except ConfigError as error:
            yield str(error)


def summary(folder: Path) -> dict[str, Any]:
    """What a finished run wrote; ConfigError: it is damaged."""
    path = folder / SUMMARY
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} is damaged ({error}); remove it: with resume=true the run ends again from its last checkpoint"
        ) from error
    return found
