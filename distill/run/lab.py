"""job=lab: trains the students of a study one after another, in one process, and summarizes what they reached.

For each regime: every setting of every arm's grid on the tuning seeds, then each arm at its best setting on the test
seeds. A student whose line is in the file of evidence is not trained again, so the same command goes on after any end.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from distill.config import owner, stop, study_plan
from distill.config.errors import ConfigError
from distill.config.schema import ConsoleMode, RunConfig
from distill.config.study import LabTargets
from distill.config.units import counted, duration
from distill.engine.dist import Dist
from distill.run import lab_caches, lab_page
from distill.run.chosen_precision import settled
from distill.run.evidence import measure, name_of
from distill.run.folder import record
from distill.run.lab_student import train_student
from distill.run.lab_study import Cell, Study

GUESS, TEACHER_GUESS = 8.0, 25.0
"""Seconds of processor time of a student, and of a regime's teachers, where none was measured yet."""


def lab(config: RunConfig, folder: Path, dist: Dist) -> None:
    if dist.world > 1:
        raise ConfigError(f"job=lab takes one process; there are {dist.world}: share a study by lab.only")
    config = settled(config, folder, dist)
    home = Path(config.lab.dir)
    home.mkdir(parents=True, exist_ok=True)
    owner.own(home, "lab.dir", "job=lab")
    folder.mkdir(parents=True, exist_ok=True)
    record(folder, config)
    study = Study(config)
    say = (lambda text: None) if config.tracking.console is ConsoleMode.off else partial(print, flush=True)
    if not config.lab.summary_only:
        Laboratory(study, home, dist, say).run()
    say(lab_page.write(study))


class Laboratory:
    """Trains what a study lacks.

    Args:
        folder: for data, caches and students in training.
        say: takes a line for the user.
    """

    def __init__(self, study: Study, folder: Path, dist: Dist, say: Callable[[str], None]):
        self.study, self.lab, self.folder, self.dist, self.say = study, study.lab, folder, dist, say
        self.evidence = study.evidence
        self._began, self._done, self._left = time.perf_counter(), 0, 0

    def run(self) -> None:
        regimes = [name for name in self.lab.regimes if name in (self.lab.only or self.lab.regimes)]
        todo = self._todo(regimes)
        self._left = len(todo)
        self.say(self._estimate(regimes, todo))
        for regime in regimes:
            for cell in self.study.tuning(regime):
                self._train(cell)
            tuned = self.study.tuned(regime)
            assert tuned is not None
            for cell in self.study.tests(regime, tuned):
                self._train(cell)

    def _train(self, cell: Cell) -> None:
        stop.check()
        self.evidence.refresh()  # another process may have had the same student
        if self.study.line(cell) is not None:
            return
        arm, targets = self.lab.arms[cell.arm], study_plan.targets_of(self.lab, cell.regime, cell.arm)
        made, data = None, str(self.folder / "data")
        if cell.config.student.cached:
            made = self._make(cell, targets)
        config = study_plan.with_data(cell.config, data)
        measures = train_student(config, arm, made and made.root, self.folder / "students" / cell.digest, self.dist)
        line = {key: getattr(cell, key) for key in ("regime", "arm", "seed", "phase", "setting")}
        line = {"study": self.lab.name, **line, **measures}
        line |= {"teacher": made.teacher} if made is not None else {}
        self.evidence.append({**line, "config": cell.digest, "sources": cell.sources})
        self.evidence.refresh()
        self._done += 1
        self._left = max(0, self._left - 1)
        seconds = time.perf_counter() - self._began
        self.say(
            f"{cell.regime} {cell.arm} seed {cell.seed} ({cell.phase}): {name_of(line)} {measure(line):.4f}, alpha "
            f"{measures['alpha']:.3f}, {measures['seconds']:.1f} s; {self._done} done at "
            f"{seconds / self._done:.1f} s each, {self._left} left, {duration(self._left * seconds / self._done)}"
        )

    def _make(self, cell: Cell, targets: LabTargets) -> lab_caches.Made:
        teachers, untils = self.study.teachers(cell.regime, cell.seed), self.study.untils(cell.regime)
        folder = lab_caches.folder_of(self.folder, teachers, untils)
        if not lab_caches.is_made(folder, targets):
            self.say(f"{cell.regime} seed {cell.seed}: {counted(len(teachers), 'teacher')} for {targets.value} targets")
        data = [study_plan.with_data(teacher, str(self.folder / "data")) for teacher in teachers]
        return lab_caches.make(folder, data, untils, targets, self.dist)

    def _todo(self, regimes: list[str]) -> set[str]:
        """Digests of students that are left to train; what is tuned alike in two regimes counts once."""
        todo: set[str] = set()
        for regime in regimes:
            todo |= {cell.digest for cell in self.study.tuning(regime) if self.study.line(cell) is None}
            tuned = self.study.tuned(regime) or {
                name: study_plan.settings_of(self.lab.arms[arm.like or name])[0]
                for name, arm in study_plan.arms_of(self.lab, regime).items()
            }
            todo |= {cell.digest for cell in self.study.tests(regime, tuned) if self.study.line(cell) is None}
        return todo

    def _estimate(self, regimes: list[str], todo: set[str]) -> str:
        seeds = len(self.lab.tuning_seeds) + self.lab.pairs
        stale = sum(self.evidence.find(digest, None) is not None for digest in todo)
        taken = [line["seconds"] for line in self.evidence if line["regime"] in regimes]
        taught = [line["teacher"]["seconds"] for line in self.evidence if "teacher" in line]
        each, teachers = _mean(taken, GUESS), _mean(taught, TEACHER_GUESS)
        missing = sum(self._lacks(regime, seed) for regime in regimes for seed in self._seeds())
        hours = (len(todo) * each + missing * teachers) / 3600
        return (
            f"study {self.lab.name}: {counted(len(regimes), 'regime')}, {counted(seeds, 'seed')}, "
            f"{counted(len(todo), 'student')} to train at {each:.1f} s ({'measured' if taken else 'a guess'}), "
            f"teachers of {counted(missing, 'cache')} at {teachers:.1f} s ({'measured' if taught else 'a guess'}): "
            f"about {hours:.2f} core-hours; lines go to {self.evidence.path}"
            + (f"; {stale} of them have a line of other sources, which lab.stale=keep counts" if stale else "")
        )

    def _seeds(self) -> list[int]:
        return [*self.lab.tuning_seeds, *study_plan.test_seeds(self.lab)]

    def _lacks(self, regime: str, seed: int) -> bool:
        teachers = self.study.teachers(regime, seed)
        folder = lab_caches.folder_of(self.folder, teachers, self.study.untils(regime))
        return bool(teachers) and not lab_caches.is_made(folder, LabTargets.captured)


def _mean(values: list[float], guess: float) -> float:
    return sum(values) / len(values) if values else guess
