"""From a study to the configuration of each student and teacher in it."""

import dataclasses
import enum
import functools
import itertools
from collections.abc import Mapping
from typing import Any

from distill.config.keys import kind_of
from distill.config.schema import (
    CodistillConfig,
    ConsoleMode,
    LabConfig,
    ReplayOrder,
    RunConfig,
    Source,
    TrackingConfig,
)
from distill.config.study import ArmKind, LabArm, LabTargets, LabTeacher, RegimeConfig

Changes = Mapping[str, Any]
"""Values by whole key."""


def changed(config: RunConfig, changes: Changes) -> RunConfig:
    """The configuration with other values; keys and values are of the schema."""
    return functools.reduce(lambda part, change: _changed(part, change[0].split("."), *change), changes.items(), config)


def _changed(part: Any, names: list[str], key: str, value: Any) -> Any:
    if not names:
        return _typed(kind_of(key), value)
    name, *rest = names
    if isinstance(part, dict):
        there = part.get(name) if name in part or not rest else kind_of(key.removesuffix("." + ".".join(rest)))()
        return part | {name: _changed(there, rest, key, value)}
    return dataclasses.replace(part, **{name: _changed(getattr(part, name), rest, key, value)})


def _typed(kind: Any, value: Any) -> Any:
    """A value of YAML as the schema has it."""
    if value is None or not isinstance(kind, type):
        return value
    if issubclass(kind, enum.Enum):
        return kind(value)
    return float(value) if kind is float else value


def chosen(lab: LabConfig) -> LabConfig:
    """The study with the arms that `only_arms` leaves."""
    return dataclasses.replace(lab, arms={name: lab.arms[name] for name in lab.only_arms or lab.arms})


def only_arm(lab: LabConfig, kind: ArmKind) -> str:
    """Name of the arm of a kind that a study has once: labels, new."""
    (name,) = (name for name, arm in lab.arms.items() if arm.kind is kind)
    return name


def arms_of(lab: LabConfig, regime: str) -> dict[str, LabArm]:
    """The arms of one of its regimes."""
    only = lab.regimes[regime].labels_only
    return {name: arm for name, arm in lab.arms.items() if not only or arm.kind is ArmKind.labels}


def settings_of(arm: LabArm) -> list[dict[str, Any]]:
    """What is tried on the tuning seeds; one empty setting where nothing is."""
    return [dict(zip(arm.grid, values)) for values in itertools.product(*arm.grid.values())]


def test_seeds(lab: LabConfig) -> list[int]:
    return list(range(lab.first_seed, lab.first_seed + lab.pairs))


def targets_of(lab: LabConfig, regime: str, arm: str) -> LabTargets:
    """Where the soft targets of a student come from."""
    return LabTargets.relabelled if lab.regimes[regime].finished else lab.arms[arm].targets


def student_of(run: RunConfig, regime: str, arm: str, setting: Changes, seed: int) -> RunConfig:
    """The configuration of one student, but for the folders of its data and its cache."""
    lab = run.lab
    part = lab.arms[arm]
    if part.like is None:
        changes = {**part.set, **setting}
    else:
        changes = {**lab.arms[part.like].set, **setting, **part.set}
    config = changed(run, {**lab.regimes[regime].set, **changes})
    student = config.student
    if student.cached and targets_of(lab, regime, arm) is LabTargets.relabelled:
        # A cache of one frozen teacher has no stream.
        student = dataclasses.replace(student, replay=dataclasses.replace(student.replay, order=ReplayOrder.own))
    return _below(dataclasses.replace(config, job="student", student=student), seed)


def teachers_in(regime: RegimeConfig) -> list[LabTeacher]:
    return [] if regime.labels_only else list(regime.teachers.values()) or [LabTeacher()]


def teachers_of(run: RunConfig, regime: str, seed: int) -> list[RunConfig]:
    """The configurations of a regime's teachers."""
    part = run.lab.regimes[regime]
    configs = []
    for teacher in teachers_in(part):
        config = changed(run, {**part.set, **teacher.set})
        if part.finished:
            config = changed(config, {"teacher.capture": False})
        configs.append(_below(dataclasses.replace(config, job="teacher"), seed))
    return configs


def with_data(config: RunConfig, folder: str) -> RunConfig:
    """The configuration with its packed data in a folder."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, dir=folder))


def _below(config: RunConfig, seed: int) -> RunConfig:
    """A run of the lab's own: quiet, resumed where it was, with data, init and order of its seed."""
    corpora = {
        name: dataclasses.replace(corpus, law=dataclasses.replace(corpus.law, draw=seed))
        if corpus.source is Source.law
        else corpus
        for name, corpus in config.data.corpora.items()
    }
    return dataclasses.replace(
        config,
        seed=seed,
        resume=True,
        data=dataclasses.replace(config.data, corpora=corpora, seed=seed),
        lab=LabConfig(),
        codistill=CodistillConfig(),
        tracking=TrackingConfig(console=ConsoleMode.off, report=False),
    )
