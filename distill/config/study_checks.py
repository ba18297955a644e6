"""Rules of job=lab: every configuration of a study is checked before the first student."""

import dataclasses
from collections import Counter
from collections.abc import Iterator

from distill.config import study_plan
from distill.config.checks import check
from distill.config.keys import unknown_key, wrong_value
from distill.config.schema import LabConfig, RunConfig
from distill.config.study import ArmKind
from distill.config.userfiles import CONF

_OWN = ("job", "seed", "resume", "data.seed", "data.dir", "cache.dir", "cache.dirs", "cache.follow")
"""Keys that a study cannot change, since the lab sets them; nor those of `lab`."""


def lab_rules(run: RunConfig) -> Iterator[str]:
    lab = run.lab
    if not lab.regimes or not lab.arms:
        known = sorted(path.stem for path in (CONF / "study").glob("*.yaml"))
        yield f"study is null; job=lab runs one: allowed: {', '.join(known)}"
        return
    if unknown := [name for name in lab.only_arms if name not in lab.arms]:
        yield f"lab.only_arms has {unknown[0]}; allowed: {', '.join(lab.arms)}"
        return
    run = dataclasses.replace(run, lab=study_plan.chosen(lab))
    lab = run.lab
    problems = [*_names(lab), *_seeds(lab), *_changes(lab)]
    yield from problems
    if not problems:
        yield from _configurations(run)


def _names(lab: LabConfig) -> Iterator[str]:
    for name in lab.only:
        if name not in lab.regimes:
            yield f"lab.only has {name}; allowed: {', '.join(lab.regimes)}"
    for key, names in (("regimes", lab.regimes), ("arms", lab.arms)):
        for name in names:
            if not name.replace("_", "").replace("-", "").isalnum():
                yield f"lab.{key}.{name}: letters, digits, '-' and '_' only"
    kinds = Counter(arm.kind for arm in lab.arms.values())
    for kind in (ArmKind.labels, ArmKind.new):
        if kinds[kind] != 1:
            yield f"lab.arms has {kinds[kind]} of kind {kind.value}; one is needed"
    for name, arm in lab.arms.items():
        if arm.like is not None and (arm.like not in lab.arms or lab.arms[arm.like].like is not None):
            allowed = ", ".join(each for each, other in lab.arms.items() if other.like is None)
            yield f"lab.arms.{name}.like is {arm.like}; allowed: {allowed}"
        if arm.like is not None and arm.grid:
            yield f"lab.arms.{name}.grid has {', '.join(arm.grid)}; an arm that is like another takes its setting"
    budgets = {name: len(study_plan.settings_of(arm)) for name, arm in lab.arms.items() if arm.grid}
    if len(set(budgets.values())) > 1:
        each = ", ".join(f"{name} {count}" for name, count in budgets.items())
        yield f"lab.arms have grids of different size ({each}); all arms that are tuned take equal budgets"


def _seeds(lab: LabConfig) -> Iterator[str]:
    if lab.pairs < 2:
        yield f"lab.pairs is {lab.pairs}; an interval takes at least 2"
    if common := set(lab.tuning_seeds) & set(study_plan.test_seeds(lab)):
        yield f"lab.tuning_seeds has {min(common)}; test seeds are {lab.first_seed} and those that follow it"
    if not lab.tuning_seeds or len(set(lab.tuning_seeds)) < len(lab.tuning_seeds):
        yield f"lab.tuning_seeds is {list(lab.tuning_seeds)}; at least one, each once"


def _changes(lab: LabConfig) -> Iterator[str]:
    """Problems of each key and value alone."""
    found = [(f"lab.regimes.{name}.set", regime.set) for name, regime in lab.regimes.items()]
    for name, regime in lab.regimes.items():
        found += [(f"lab.regimes.{name}.teachers.{each}.set", t.set) for each, t in regime.teachers.items()]
    for name, arm in lab.arms.items():
        found += [(f"lab.arms.{name}.set", arm.set)]
        found += [(f"lab.arms.{name}.grid", setting) for setting in study_plan.settings_of(arm)]
    problems = []
    for where, changes in found:
        for key, value in changes.items():
            problem = unknown_key(key) or wrong_value(key, value)
            if key in _OWN or key.startswith("lab."):
                problem = f"{key} is set by the lab"
            problems += [f"{where}: {problem}"] if problem else []
    yield from dict.fromkeys(problems)


def _configurations(run: RunConfig) -> Iterator[str]:
    """Broken rules of each whole configuration, once for each regime and arm."""
    lab, problems = run.lab, []
    seed = lab.tuning_seeds[0]
    for regime in lab.regimes:
        for teacher in study_plan.teachers_of(run, regime, seed):
            problems += [f"lab.regimes.{regime}: {problem}" for problem in check(teacher)]
        for name, arm in study_plan.arms_of(lab, regime).items():
            tried = study_plan.settings_of(lab.arms[arm.like] if arm.like is not None else arm)
            for setting in tried:
                student = study_plan.student_of(run, regime, name, setting, seed)
                if student.student.cached and lab.regimes[regime].labels_only:
                    problems.append(
                        f"lab.regimes.{regime}.labels_only is true; arm {name} reads a cache of its teacher"
                    )
                student = study_plan.changed(student, {"cache.dir": "made by the lab"})
                problems += [f"lab.regimes.{regime}: arm {name}: {problem}" for problem in check(student)]
    yield from dict.fromkeys(problems)
