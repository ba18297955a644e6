"""What the lines of a study say, regime by regime: tuned settings, paired differences, verdicts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from distill.config import study_plan
from distill.config.study import ArmKind
from distill.run.evidence import Line, measure
from distill.run.intervals import Interval, interval
from distill.run.lab_study import Study

STATIC = (ArmKind.static, ArmKind.labels)
"""Of these arms the best on the tuning seeds is what the new one is compared with: alpha 0 is a static weight too."""


class ArmResult(NamedTuple):
    """Of one arm in one regime, on the test seeds that all arms have."""

    setting: Mapping[str, Any]
    mean: float
    """Excess or loss, nats."""
    spread: float
    """Standard deviation over seeds; nan: one seed."""
    gain: Interval
    """Labels' less the arm's."""
    alpha: float
    seconds: float


class RegimeResult(NamedTuple):
    """Of one regime."""

    regime: str
    arms: dict[str, ArmResult]
    best: str
    """The best static arm on the tuning seeds."""
    margin: Interval
    """The new arm's less the best static one's."""
    verdict: str
    better: str | None
    """Whether it is better by the limit; None: the regime does not ask for it."""
    controls: dict[str, str]
    """Verdict of each control."""
    lead: float
    """Labels' less the finished last teacher's, mean over the test seeds; nan: no line names a teacher."""
    teacher: float
    tokens: int
    """Of a student."""
    sources: frozenset[str]
    """Digests of the sources of these lines."""
    measures: dict[str, dict[int, float]]
    """Of each arm by test seed."""


def results(study: Study) -> list[RegimeResult]:
    """Of every regime that has all of its tuning lines and two pairs."""
    return [found for name in study.lab.regimes if (found := _regime(study, name)) is not None]


def missing(study: Study) -> dict[str, tuple[int, int]]:
    """Lines that a regime has, and all that it takes, where some are missing; of those that `only` leaves out, too."""
    counts = {}
    for name in study.lab.regimes:
        tuned = study.tuned(name)
        cells = list(study.tuning(name))
        tests = list(study.tests(name, tuned)) if tuned else []
        wanted = len(cells) + len(study_plan.arms_of(study.lab, name)) * study.lab.pairs
        have = sum(study.line(cell) is not None for cell in [*cells, *tests])
        if have < wanted:
            counts[name] = have, wanted
    return counts


def _regime(study: Study, regime: str) -> RegimeResult | None:
    lab, tuned = study.lab, study.tuned(regime)
    pairs = _pairs(study, regime, tuned)
    if lab.regimes[regime].labels_only or tuned is None or len(pairs) < 2:
        return None
    kinds = {kind: [name for name, arm in lab.arms.items() if arm.kind is kind] for kind in ArmKind}
    labels, new = (study_plan.only_arm(lab, kind) for kind in (ArmKind.labels, ArmKind.new))
    arms = {name: _arm(pairs, name, labels, tuned[name]) for name in lab.arms}
    statics = [name for kind in STATIC for name in kinds[kind]]
    scores = {name: study.tuning_mean(regime, name, tuned[name]) for name in statics}
    best = min(statics, key=lambda name: math.inf if (score := scores[name]) is None else score)
    margin = _difference(pairs, new, best)
    taught = [(measure(line["teacher"]), measure(lines[labels])) for lines in pairs if (line := _cached(lines))]
    teacher = float(np.mean([there for there, _ in taught])) if taught else math.nan
    return RegimeResult(
        regime,
        arms,
        best,
        margin,
        margin.verdict(lab.limits.same),
        margin.verdict(-lab.limits.better) if lab.regimes[regime].unknown else None,
        {name: arms[name].gain.verdict(lab.limits.control) for name in kinds[ArmKind.control]},
        float(np.mean([here - there for there, here in taught])) if taught else math.nan,
        teacher,
        pairs[0][labels]["tokens"],
        frozenset(line["sources"] for lines in pairs for line in lines.values()),
        {name: {lines[name]["seed"]: measure(lines[name]) for lines in pairs} for name in lab.arms},
    )


def _pairs(study: Study, regime: str, tuned: Mapping[str, Mapping[str, Any]] | None) -> list[dict[str, Line]]:
    """Lines of all of a regime's arms, of each test seed that has them; none before the arms are tuned."""
    by_seed: dict[int, dict[str, Line]] = {}
    for cell in study.tests(regime, tuned) if tuned is not None else ():
        if (line := study.line(cell)) is not None:
            by_seed.setdefault(cell.seed, {})[cell.arm] = line
    return [lines for _, lines in sorted(by_seed.items()) if len(lines) == len(study_plan.arms_of(study.lab, regime))]


def _arm(pairs: Sequence[dict[str, Line]], name: str, labels: str, setting: Mapping[str, Any]) -> ArmResult:
    values = [measure(lines[name]) for lines in pairs]
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    alpha, seconds = (float(np.mean([lines[name][key] for lines in pairs])) for key in ("alpha", "seconds"))
    gain = _difference(pairs, labels, name)
    return ArmResult(setting, float(np.mean(values)), spread, gain, alpha, seconds)


def _difference(pairs: Sequence[dict[str, Line]], one: str, other: str) -> Interval:
    return interval([measure(lines[one]) - measure(lines[other]) for lines in pairs])


def _cached(lines: dict[str, Line]) -> Line | None:
    """A line that names the teacher."""
    return next((line for line in lines.values() if "teacher" in line), None)


def overall(study: Study, found: Sequence[RegimeResult]) -> dict[str, Interval]:
    """The new arm's measure less that of each other arm, and of each regime's best static one (`best static`).

    A seed counts once, by its mean over regimes: its students have data in common, and some the same labels' student.
    """
    new = study_plan.only_arm(study.lab, ArmKind.new)
    seeds = sorted(set.intersection(*(set(result.measures[new]) for result in found)))
    others = {name: [name] * len(found) for name in study.lab.arms if name != new}
    others = {"best static": [result.best for result in found]} | others
    return {
        name: interval(
            [
                float(np.mean([r.measures[new][seed] - r.measures[arm][seed] for r, arm in zip(found, arms)]))
                for seed in seeds
            ]
        )
        for name, arms in others.items()
        if len(seeds) > 1
    }


# ---------------------------------------------------------------- lengths


class LengthResult(NamedTuple):
    """Of one arm at one length of a curve."""

    tokens: int
    """Of a student."""
    mean: float
    """Excess or loss, nats."""
    closed: float
    """Share of the gap between labels and teacher; nan: the teacher is no better than labels, or there is none."""
    times: float
    """Tokens that labels need for the same measure over the arm's own; inf: more than any labels' run had."""


def lengths(study: Study, found: Sequence[RegimeResult]) -> dict[tuple[str, str], LengthResult]:
    """By regime and arm, for regimes on a curve."""
    out = {}
    labels = study_plan.only_arm(study.lab, ArmKind.labels)
    alone = _labels_alone(study, labels)
    for result in found:
        curve = study.lab.regimes[result.regime].curve
        if curve is None:
            continue
        on_curve = sorted(
            [
                (other.tokens, other.arms[labels].mean)
                for other in found
                if study.lab.regimes[other.regime].curve == curve
            ]
            + [(only.tokens, only.mean) for name, only in alone.items() if study.lab.regimes[name].curve == curve]
        )
        gap = result.arms[labels].mean - result.teacher
        for name, arm in result.arms.items():
            closed = (result.arms[labels].mean - arm.mean) / gap if gap > 0 else math.nan
            times = tokens_for(arm.mean, on_curve) / result.tokens
            out[result.regime, name] = LengthResult(result.tokens, arm.mean, closed, times)
    return out | {(name, labels): only for name, only in alone.items()}


def _labels_alone(study: Study, labels: str) -> dict[str, LengthResult]:
    """Of regimes that have labels alone."""
    out = {}
    for name, regime in study.lab.regimes.items():
        pairs = _pairs(study, name, study.tuned(name)) if regime.labels_only else []
        if len(pairs) >= 2:
            lines = [pair[labels] for pair in pairs]
            out[name] = LengthResult(lines[0]["tokens"], float(np.mean([*map(measure, lines)])), math.nan, 1.0)
    return out


def tokens_for(value: float, curve: Sequence[tuple[int, float]]) -> float:
    """Tokens at which a curve of (tokens, measure) reaches a value, by straight lines over log tokens.

    inf: below the last point. Above the first one the first stretch is continued.
    """
    if len(curve) < 2:
        return math.inf if not curve or value < curve[0][1] else float(curve[0][0])
    if value < curve[-1][1]:
        return math.inf
    stretch = next(i for i in range(len(curve) - 1) if value >= curve[i + 1][1])
    (low, at_low), (high, at_high) = curve[stretch], curve[stretch + 1]
    if at_low == at_high:
        return float(low)
    share = (at_low - value) / (at_low - at_high)
    return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))


def study_seeds(study: Study) -> str:
    """For people."""
    tests = study_plan.test_seeds(study.lab)
    return f"tuning seeds {', '.join(map(str, study.lab.tuning_seeds))}; test seeds {tests[0]} to {tests[-1]}"
