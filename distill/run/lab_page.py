"""The page of a study: tables of verdicts, of arms, and of lengths; the picture beside it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distill.config import study_plan
from distill.config.files import write_text
from distill.config.study import ArmKind
from distill.config.values import shown
from distill.run import lab_results
from distill.run.evidence import sources_digest
from distill.run.intervals import Interval
from distill.run.lab_picture import Point, svg
from distill.run.lab_results import RegimeResult
from distill.run.lab_study import Study


def write(study: Study) -> str:
    """Writes page and picture beside the evidence; a sentence about what is there."""
    found, path = lab_results.results(study), study.evidence.path
    page = "\n".join(_page(study, found)) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path.with_suffix(".md"), page)
    new = study_plan.only_arm(study.lab, ArmKind.new)
    points = [
        Point(r.regime, r.lead, r.arms[new].gain.mean, r.arms[new].gain.low, r.arms[new].gain.high,
              r.arms[r.best].gain.mean)
        for r in found
    ]  # fmt: skip
    write_text(path.with_suffix(".svg"), svg(f"Study {study.lab.name}: gain against lead", points))
    verdicts = ", ".join(f"{r.regime} {r.verdict}" for r in found) or "no regime has all of its lines yet"
    return f"{path.with_suffix('.md')}: {verdicts}"


def _page(study: Study, found: Sequence[RegimeResult]) -> Iterator[str]:
    lab, limits = study.lab, study.lab.limits
    yield f"# Study {lab.name}"
    yield ""
    yield f"Made by `codistill job=lab study={lab.name}` from [{study.evidence.path.name}]({study.evidence.path.name})."
    yield (
        f"Students of equal seed are pairs: same data, same init. Intervals are of the mean, 95 %, Student's t; "
        f"{lab_results.study_seeds(study)}. Nats per token; the measure is the excess over the known law where there "
        "is one, else the held-out loss."
    )
    yield (
        f"Limits, set before running: *pass* where the upper end of (new - best static) is below {limits.same:g}, "
        f"*better* where it is below {-limits.better:g}, a control passes where that of (labels - control) is below "
        f"{limits.control:g}; *fail* where the lower end is above; else *undecided*."
    )
    yield ""
    yield from _sources(study, found)
    missing = lab_results.missing(study)
    for name in lab.only or lab.regimes:
        if name in missing:
            yield f"Regime {name} has {missing[name][0]} of {missing[name][1]} lines."
    if left_out := [name for name in missing if lab.only and name not in lab.only]:
        yield f"Left out by `lab.only`, and without all of their lines: {', '.join(left_out)}."
    if study.evidence.unreadable:
        yield f"Lines that are not readable and do not count: {study.evidence.unreadable}."
    if found:
        yield ""
        yield f"![gain against lead]({study.evidence.path.with_suffix('.svg').name})"
        yield ""
        yield from _verdicts(found)
        yield ""
        yield from _arms(found)
        if len(found) > 1 and all(regime.curve is None for regime in lab.regimes.values()):
            yield ""
            yield from _overall(study, found)
        if any(regime.curve is not None for regime in lab.regimes.values()):
            yield ""
            yield from _lengths(study, found)


def _sources(study: Study, found: Sequence[RegimeResult]) -> Iterator[str]:
    there = {digest for result in found for digest in result.sources}
    now = {sources_digest(kind) for kind in ("labels", "cached")}
    if there - now:
        yield (
            f"Stale: some lines were made by other sources ({', '.join(sorted(there - now))}) than those that are "
            f"here now ({', '.join(sorted(now))})."
        )


def _verdicts(found: Sequence[RegimeResult]) -> Iterator[str]:
    controls = list(found[0].controls)
    yield from _rows(["regime", "lead", "best static", "new - best static", "verdict", "better", *controls])
    for r in found:
        named = f"{r.best} ({_setting(r.arms[r.best].setting)})"
        cells = [r.regime, _number(r.lead), named, _interval(r.margin), r.verdict, r.better or ""]
        yield _row([*cells, *(r.controls[name] for name in controls)])


def _arms(found: Sequence[RegimeResult]) -> Iterator[str]:
    yield from _rows(["regime", "arm", "tuned", "measure", "over seeds", "gain over labels", "mean alpha", "seconds"])
    for r in found:
        for name, arm in r.arms.items():
            cells = [r.regime, name, _setting(arm.setting), _number(arm.mean), _number(arm.spread)]
            yield _row([*cells, _interval(arm.gain), f"{arm.alpha:.3f}", f"{arm.seconds:.1f}"])


def _overall(study: Study, found: Sequence[RegimeResult]) -> Iterator[str]:
    regimes = ", ".join(result.regime for result in found)
    yield (
        f"New less each arm, mean over {regimes}; a seed counts once, since its students in several regimes have data "
        "in common."
    )
    yield ""
    yield from _rows(["arm", "new - arm"])
    yield from (_row([name, _interval(margin)]) for name, margin in lab_results.overall(study, found).items())


def _lengths(study: Study, found: Sequence[RegimeResult]) -> Iterator[str]:
    yield (
        "Tokens that labels need are read off straight lines, over log tokens, between the lengths that they were "
        "trained for: too many where their loss falls less with each doubling."
    )
    yield ""
    yield from _rows(["regime", "tokens", "arm", "measure", "share of the gap closed", "tokens that labels need"])
    for (regime, arm), length in lab_results.lengths(study, found).items():
        closed = "" if math.isnan(length.closed) else f"{100 * length.closed:.0f} %"
        times = "more than the longest labels' run" if math.isinf(length.times) else f"{length.times:.2f} times"
        yield _row([regime, f"{length.tokens:,}", arm, _number(length.mean), closed, times])


def _rows(header: Sequence[str]) -> list[str]:
    return [_row(header), _row(["---"] * len(header))]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _setting(setting: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.removeprefix('student.')}={shown(value)}" for key, value in setting.items())


def _interval(i: Interval) -> str:
    return f"{i.mean:+.4f} [{i.low:+.4f}, {i.high:+.4f}], n={i.pairs}"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"
