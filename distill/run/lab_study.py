"""The students of a study, and the lines of evidence that they have."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from distill.config import study_plan
from distill.config.schema import RunConfig
from distill.config.study import Stale
from distill.run.evidence import Evidence, Line, config_digest, measure, sources_digest


class Cell(NamedTuple):
    """One student of a study."""

    regime: str
    arm: str
    setting: Mapping[str, Any]
    seed: int
    phase: str
    """tuning or test."""
    config: RunConfig
    digest: str
    sources: str
    """Digest of the program's files that decide its result."""


class Study:
    """The cells of a study.

    Attributes:
        evidence: the file's lines.
    """

    def __init__(self, config: RunConfig):
        self.lab = study_plan.chosen(config.lab)
        self.config = dataclasses.replace(config, lab=self.lab)
        self.evidence = Evidence(Path(config.lab.evidence))
        self.evidence.refresh()
        self._cells: dict[tuple[Any, ...], Cell] = {}
        self._teachers: dict[tuple[str, int], list[RunConfig]] = {}

    def cell(self, regime: str, arm: str, setting: Mapping[str, Any], seed: int, phase: str) -> Cell:
        key = regime, arm, repr(setting), seed, phase
        if key not in self._cells:
            config = study_plan.student_of(self.config, regime, arm, setting, seed)
            targets, untils = study_plan.targets_of(self.lab, regime, arm), self.untils(regime)
            digest = config_digest(config, self.teachers(regime, seed), untils, self.lab.arms[arm], targets)
            sources = sources_digest("cached" if config.student.cached else "labels")
            self._cells[key] = Cell(regime, arm, setting, seed, phase, config, digest, sources)
        return self._cells[key]

    def teachers(self, regime: str, seed: int) -> list[RunConfig]:
        if (regime, seed) not in self._teachers:
            self._teachers[regime, seed] = study_plan.teachers_of(self.config, regime, seed)
        return self._teachers[regime, seed]

    def untils(self, regime: str) -> list[float]:
        return [teacher.until for teacher in study_plan.teachers_in(self.lab.regimes[regime])]

    def tuning(self, regime: str) -> Iterator[Cell]:
        for seed in self.lab.tuning_seeds:
            for name, arm in study_plan.arms_of(self.lab, regime).items():
                for setting in study_plan.settings_of(arm) if arm.like is None else ():
                    yield self.cell(regime, name, setting, seed, "tuning")

    def tests(self, regime: str, tuned: Mapping[str, Mapping[str, Any]]) -> Iterator[Cell]:
        for seed in study_plan.test_seeds(self.lab):
            for name in study_plan.arms_of(self.lab, regime):
                yield self.cell(regime, name, tuned[name], seed, "test")

    def line(self, cell: Cell) -> Line | None:
        """The cell's own, if it counts."""
        keeps = self.lab.stale is Stale.keep or self.lab.summary_only
        return self.evidence.find(cell.digest, cell.sources) or (
            self.evidence.find(cell.digest, None) if keeps else None
        )

    def tuned(self, regime: str) -> dict[str, Mapping[str, Any]] | None:
        """The best setting of each arm, by the mean over the tuning seeds; None: not all were tried."""
        best: dict[str, Mapping[str, Any]] = {}
        arms = study_plan.arms_of(self.lab, regime)
        for name, arm in arms.items():
            if arm.like is None:
                means = []
                for setting in study_plan.settings_of(arm):
                    value = self.tuning_mean(regime, name, setting)
                    if value is None:
                        return None
                    means.append((value, setting))
                best[name] = min(means, key=lambda pair: pair[0])[1]
        return {name: best[arm.like or name] for name, arm in arms.items()}

    def tuning_mean(self, regime: str, arm: str, setting: Mapping[str, Any]) -> float | None:
        cells = [self.cell(regime, arm, setting, seed, "tuning") for seed in self.lab.tuning_seeds]
        lines = [line for cell in cells if (line := self.line(cell)) is not None]
        return sum(map(measure, lines)) / len(lines) if len(lines) == len(cells) else None
