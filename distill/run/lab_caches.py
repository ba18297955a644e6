"""The caches of a study's regimes: teachers that train and capture, merged, or labelled again by the finished one.

Each is made once for its configuration and seed in the lab's run folder, with the product's own jobs, and found there
by later students and later starts.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distill.cache.open_store import open_store
from distill.config import json_text
from distill.config.files import write_text
from distill.config.schema import RunConfig
from distill.config.study import LabTargets
from distill.engine.dist import Dist
from distill.run import build
from distill.run.backfill import backfill
from distill.run.evidence import sources_digest, teachers_digest
from distill.run.lab_student import held_out_measures
from distill.run.run import Run
from distill.run.trainer import to_checkpoints, train
from distill.tools.merge import merge

SHARD_BYTES = 1 << 17
"""Of merged caches: as small as what a teacher captures, since a shard has one mean loss."""
DONE = "teachers.json"
"""What the teachers of a regime reached; marks their caches as whole."""


class Made(NamedTuple):
    """The caches of one regime and seed."""

    root: str
    """cache.dir of students."""
    teacher: dict[str, Any]
    """Of the last teacher at its end: held-out measures, and the seconds of processor time that all of them took."""


def folder_of(home: Path, teachers: Sequence[RunConfig], untils: Sequence[float]) -> Path:
    """Where the teachers of a regime and their caches are."""
    return home / "caches" / f"{teachers_digest(teachers, untils)}-{sources_digest('teachers')}"


def is_made(folder: Path, targets: LabTargets) -> bool:
    return (folder / DONE).exists() and (targets is not LabTargets.relabelled or (folder / "relabelled.json").exists())


def make(folder: Path, teachers: Sequence[RunConfig], untils: Sequence[float], targets: LabTargets, dist: Dist) -> Made:
    """Trains what is not there yet.

    Args:
        untils: share of each teacher's steps after which it ends.
    """
    runs = [folder / f"teacher-{number}" for number in range(len(teachers))]
    if not (folder / DONE).exists():
        began, measures = time.process_time(), {}
        for config, until, place in zip(teachers, untils, runs):
            measures = _teach(config, until, place, dist)
        if len(runs) > 1:
            _merge(teachers[0], runs, folder / "merged")
        write_text(folder / DONE, json_text.dumps({**measures, "seconds": time.process_time() - began}) + "\n")
    taught = json.loads((folder / DONE).read_text())
    if targets is not LabTargets.relabelled:
        root = folder / "merged" if len(runs) > 1 else runs[0] / "cache"
        return Made(str(root), taught)
    if not is_made(folder, targets):
        _relabel(teachers[-1], runs[-1], folder, dist)
    again = json.loads((folder / "relabelled.json").read_text())
    return Made(str(folder / "relabelled"), taught | {"relabelling": again["seconds"]})


def _teach(config: RunConfig, until: float, folder: Path, dist: Dist) -> dict[str, Any]:
    """Trains a teacher up to its end, or goes on from its checkpoint; returns held-out measures."""
    if not (folder / "checkpoints").exists():
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed; its cache is of a run that is gone
    with Run(config, folder, dist) as run:
        build.prepare(run)
        trainer, capture = build.teacher(run)
        last = max(1, round(trainer.steps * until))
        train(run, {"teacher": trainer}, lambda _: to_checkpoints(trainer, last))
        measures = held_out_measures(run, trainer.engine.model)
        if capture is not None:
            capture.close()
        trainer.engine.close()
    return measures


def _merge(config: RunConfig, runs: Sequence[Path], target: Path) -> None:
    """Of each corpus."""
    names = list(config.data.corpora)
    for name in names:
        below = name if len(names) > 1 else ""
        sources = [open_store(str(run / "cache" / below)) for run in runs]
        merge(sources, open_store(str(target / below)), shard_bytes=SHARD_BYTES)


def _relabel(teacher: RunConfig, source: Path, folder: Path, dist: Dist) -> None:
    """By the teacher of the run in `source`."""
    began = time.process_time()
    config = dataclasses.replace(
        teacher,
        job="backfill",
        init_from=str(source),
        cache=dataclasses.replace(teacher.cache, dir=str(folder / "relabelled")),
    )
    backfill(config, folder / "relabelling", dist)
    write_text(folder / "relabelled.json", json_text.dumps({"seconds": time.process_time() - began}) + "\n")
