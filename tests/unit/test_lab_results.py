"""What a study makes of lines of evidence: which count, which setting is tuned, intervals and verdicts."""

import itertools
import json
import math
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from distill.config.errors import ConfigError
from distill.config.load import resolve
from distill.config.study_plan import changed, student_of
from distill.run import evidence, lab_page
from distill.run.evidence import Evidence
from distill.run.intervals import interval, t_quantile
from distill.run.lab import Laboratory
from distill.run.lab_results import lengths, missing, overall, results, tokens_for
from distill.run.lab_study import Study
from tests.bench import precision

QUICK = ["job=lab", "study=quick", "lab.only=[size]", "lab.pairs=5", "lab.tuning_seeds=[101,102]"]


def study(tmp_path, *more):
    return Study(resolve([*QUICK, f"lab.evidence={tmp_path}/quick.jsonl", *more]))


def forge(made, cell, excess, **more):
    line = {"study": "quick", "regime": cell.regime, "arm": cell.arm, "seed": cell.seed, "phase": cell.phase,
            "setting": dict(cell.setting), "excess": excess, "loss": excess + 2.0, "alpha": 0.5, "tokens": 1000,
            "seconds": 1.0, "config": cell.digest, "sources": cell.sources}  # fmt: skip
    if cell.config.student.cached:
        line["teacher"] = {"excess": 0.1, "loss": 2.1, "seconds": 3.0}
    made.evidence.append({**line, **more})


def forge_all(made, new, tuning=lambda arm, number: 0.5 + 0.1 * number):
    """Lines of the regime `size`; on test seeds about 0.3 for constant, 0.4 for labels, constant's plus `new`."""
    numbers = {}
    for cell in made.tuning("size"):
        number = numbers.setdefault((cell.arm, cell.seed), itertools.count())
        forge(made, cell, tuning(cell.arm, next(number)))
    made.evidence.refresh()
    noise = np.random.default_rng(0).normal(0, 0.002, made.lab.pairs)
    values = {"labels": 0.4 + noise, "constant": 0.3 + noise, "new": 0.3 + noise + new, "shuffled": 0.45 + noise}
    for cell in made.tests("size", made.tuned("size")):
        forge(made, cell, float(values[cell.arm][cell.seed]))
    made.evidence.refresh()
    return values


@pytest.mark.parametrize(("share", "freedom"), [(0.975, 1), (0.975, 2), (0.975, 7), (0.9, 3), (0.999, 40), (0.5, 4)])
def test_quantiles_are_those_of_scipy(share, freedom):
    assert t_quantile(share, freedom) == pytest.approx(stats.t.ppf(share, freedom), rel=1e-9, abs=1e-9)


def test_an_interval_is_that_of_a_paired_t_test():
    random = np.random.default_rng(1)
    one, other = random.normal(0.5, 0.1, 9), random.normal(0.4, 0.1, 9)
    found = interval(list(one - other))
    want = stats.ttest_rel(one, other).confidence_interval(0.95)
    np.testing.assert_allclose((found.low, found.high), (want.low, want.high), rtol=1e-9)
    assert interval([0.3]) == (0.3, -math.inf, math.inf, 1)


@pytest.mark.parametrize(
    ("new", "verdict"),
    [
        ([-0.002, 0.0, 0.001, -0.001, 0.002], "pass"),
        ([-0.02, 0.03, 0.06, -0.03, 0.0], "undecided"),
        ([0.05, 0.06, 0.05, 0.04, 0.05], "fail"),
    ],
)
def test_verdicts_on_forged_lines(tmp_path, new, verdict):
    made = study(tmp_path)
    # On the tuning seeds the second setting is the best one, and constant weights are better than labels.
    values = forge_all(made, np.array(new), lambda arm, number: 0.5 + (arm == "labels") * 0.1 - 0.1 * (number == 1))
    (found,) = results(made)
    assert (found.regime, found.best, found.verdict, found.better) == ("size", "constant", verdict, None)
    want = stats.ttest_rel(values["new"], values["constant"]).confidence_interval(0.95)
    np.testing.assert_allclose((found.margin.low, found.margin.high), (want.low, want.high), atol=1e-9)
    assert found.arms["constant"].setting["student.weighting.alpha"] == 0.9
    assert found.arms["new"].setting == found.arms["shuffled"].setting
    assert found.controls == {"shuffled": "pass"}
    assert found.lead == pytest.approx(values["labels"].mean() - 0.1)
    assert found.arms["new"].gain.mean == pytest.approx((values["labels"] - values["new"]).mean())
    page = lab_page.write(made)
    assert page.endswith(f"size {verdict}")
    text = (tmp_path / "quick.md").read_text()
    assert f"| {verdict} |" in text and "Stale" not in text and "Regime" not in text
    assert "best static" in (tmp_path / "quick.svg").read_text()


def test_better_is_asked_for_where_the_lead_is_unknown(tmp_path):
    made = study(tmp_path, "lab.regimes.size.unknown=true")
    forge_all(made, np.array([-0.05, -0.06, -0.05, -0.04, -0.05]))
    (found,) = results(made)
    assert (found.verdict, found.better) == ("pass", "pass")


def test_a_control_that_helps_fails(tmp_path):
    made = study(tmp_path, "lab.limits.control=1e-4")
    forge_all(made, np.zeros(5))
    for cell in made.tests("size", made.tuned("size")):
        if cell.arm == "shuffled":
            forge(made, cell, 0.3 + 0.001 * cell.seed)  # the last line of a student counts
    made.evidence.refresh()
    assert results(made)[0].controls == {"shuffled": "fail"}


def test_the_best_static_arm_is_chosen_on_tuning_seeds_alone(tmp_path):
    made = study(tmp_path)
    forge_all(made, np.zeros(5), lambda arm, number: 0.2 if arm == "labels" else 0.5)
    assert results(made)[0].best == "labels"  # though it is worse on the test seeds


def test_lines_of_other_sources_do_not_count_unless_they_are_kept(tmp_path):
    made = study(tmp_path)
    forge_all(made, np.zeros(5))
    lines = [json.loads(line) for line in made.evidence.path.read_text().splitlines()]
    made.evidence.path.write_text("".join(json.dumps({**line, "sources": "0" * 16}) + "\n" for line in lines))
    assert results(study(tmp_path)) == []
    kept = study(tmp_path, "lab.stale=keep")
    assert len(results(kept)) == 1
    labs = [Laboratory(each, tmp_path, None, None) for each in (study(tmp_path), kept)]
    estimates = [lab._estimate(["size"], lab._todo(["size"])) for lab in labs]
    assert estimates[0].endswith(f"; {len(lines)} of them have a line of other sources, which lab.stale=keep counts")
    assert " 0 students to train" in estimates[1] and estimates[1].endswith("quick.jsonl")
    summary = study(tmp_path, "lab.summary_only=true")
    assert lab_page.write(summary).endswith("size pass")
    assert "Stale: some lines were made by other sources (0000000000000000)" in (tmp_path / "quick.md").read_text()


def test_missing_lines_are_counted(tmp_path):
    made = study(tmp_path)
    forge_all(made, np.zeros(5))
    lines = made.evidence.path.read_text().splitlines()
    made.evidence.path.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:30])
    again = study(tmp_path)
    assert again.evidence.unreadable == 0  # a line that is being written
    forge(again, next(iter(again.tuning("size"))), 0.5)
    again.evidence.refresh()
    assert again.evidence.unreadable == 1
    lab_page.write(again)
    text = (tmp_path / "quick.md").read_text()
    wanted = 2 * 2 * 3 + 5 * 4
    assert f"Regime size has {wanted - 1} of {wanted} lines." in text
    assert "not readable and do not count: 1." in text


def test_over_all_regimes_a_seed_counts_once(tmp_path):
    made = study(tmp_path)
    forge_all(made, np.linspace(-0.2, 0.1, 5))
    (found,) = results(made)
    again = overall(made, [found, found._replace(regime="again")])
    assert again["best static"] == pytest.approx(found.margin)
    assert again["labels"].mean == pytest.approx(-found.arms["new"].gain.mean)
    assert list(again) == ["best static", *(name for name in made.lab.arms if name != "new")]


def test_a_page_names_the_regimes_that_only_leaves_out(tmp_path):
    forge_all(study(tmp_path), np.zeros(5))
    lab_page.write(study(tmp_path, "lab.only=[size]", "lab.summary_only=true"))
    left_out = (
        "Left out by `lab.only`, and without all of their lines: time, both, weaker, finished, replaced, mixture."
    )
    assert left_out in (tmp_path / "quick.md").read_text()


# ---------------------------------------------------------------- digests


def test_a_digest_depends_on_what_decides_the_result_and_on_nothing_else(tmp_path):
    def digests(*more, arm="new", regime="size"):
        made = study(tmp_path, *more)
        setting = next(cell.setting for cell in made.tuning("size") if cell.arm == arm)
        return made.cell(regime, arm, setting, 3, "test").digest

    new, labels = digests(), digests(arm="labels")
    how = ["student.train.log_every=10", "student.train.accumulation=2", "teacher.train.head_chunk=64"]
    for same in (how, ["lab.pairs=7"], ["engine.threads=1"], ["tracking=offline"],
                 ["student.weighting.entropy.skip=0.3"], ["cache.queue=3"]):  # fmt: skip
        assert digests(*same) == new, same
    for other in (["student.train.batch=4"], ["teacher.optim.eps=0.1"], ["cache.codec.draws=5"], ["evaluate.samples=9"],
                  ["student.weighting.final_alpha=0.1"], ["data.corpora.main.law.strength=2"]):  # fmt: skip
        assert digests(*other) != new, other
    for same in (["teacher.optim.eps=0.1"], ["student.weighting.alpha=0.1"], ["cache.codec.draws=5"]):
        assert digests(*same, arm="labels") == labels, same
    # Without soft targets a student is the same in regimes that differ in their teachers.
    assert digests(arm="labels", regime="weaker") == labels and digests(regime="weaker") != new
    made = study(tmp_path)
    seeds = {made.cell("size", "labels", {}, seed, "test").digest for seed in range(5)}
    assert len(seeds) == 5
    assert made.cell("size", "new", {}, 0, "test").digest != made.cell("size", "shuffled", {}, 0, "test").digest


def test_comments_docstrings_and_layout_are_no_part_of_sources():
    one = 'def f(x):\n    """Doc."""\n    return x  # why\n'
    other = "'''Another.'''\n\ndef f(x):\n\n    return (x)\n"
    assert evidence._meaning(one) == evidence._meaning(other) != evidence._meaning("def f(x):\n    return -x\n")
    assert len({evidence.sources_digest(kind) for kind in evidence.SOURCES}) == len(evidence.SOURCES) == 3


def test_lines_of_two_processes_do_not_mix(tmp_path):
    one, other = Evidence(tmp_path / "e.jsonl"), Evidence(tmp_path / "e.jsonl")
    for number in range(4):
        (one, other)[number % 2].append({"config": str(number), "sources": "s", "loss": number, "arm": "x" * 5000})
    for each in (one, other):
        each.refresh()
        assert [each.find(str(number), "s")["loss"] for number in range(4)] == [0, 1, 2, 3]
        assert each.find("1", "t") is None and each.find("1", None)["loss"] == 1


# ---------------------------------------------------------------- lengths


def test_tokens_that_labels_need_are_interpolated_over_log_tokens():
    curve = [(1000, 3.0), (4000, 2.5), (16000, 2.2)]
    for value in (2.9, 2.5, 2.3, 2.2):
        want = math.exp(np.interp(-value, [-3.0, -2.5, -2.2], np.log([1000, 4000, 16000])))
        assert tokens_for(value, curve) == pytest.approx(want)
    assert tokens_for(2.1, curve) == math.inf
    assert tokens_for(3.5, curve) == pytest.approx(250.0)


def test_lengths_of_a_curve(tmp_path):
    made = study(tmp_path, "lab.regimes.size.curve=smoke", "lab.regimes.weaker.curve=smoke")
    values = forge_all(made, np.full(5, -0.1))
    (found,) = results(made)
    gap = values["labels"].mean() - 0.1
    longer = found._replace(regime="weaker", tokens=4000)
    longer.arms["labels"] = found.arms["labels"]
    length = lengths(made, [found])["size", "new"]
    assert length.closed == pytest.approx((values["labels"] - values["new"]).mean() / gap)
    assert length.times == math.inf
    labels = found.arms["labels"]
    at_four = found._replace(regime="weaker", tokens=4000, arms={**found.arms, "labels": labels._replace(mean=0.1)})
    want = math.exp(np.interp(-found.arms["new"].mean, [-labels.mean, -0.1], np.log([1000, 4000]))) / 1000
    assert lengths(made, [found, at_four])["size", "new"].times == pytest.approx(want)


def test_a_longer_run_of_labels_alone_is_a_point_of_the_curve(tmp_path):
    made = study(tmp_path, "lab.regimes.size.curve=smoke", "lab.regimes.weaker.curve=smoke",
                 "lab.regimes.weaker.labels_only=true", "+lab.regimes.weaker.set={student.train.steps: 1000}",
                 "lab.only=[size,weaker]")  # fmt: skip
    forge_all(made, np.full(5, -0.1))
    assert "weaker" in missing(made)
    for cell in made.tuning("weaker"):
        assert cell.arm == "labels"
        forge(made, cell, 0.5 - 0.01 * cell.setting.get("student.optim.lr", 0), tokens=4000)
    made.evidence.refresh()
    for cell in made.tests("weaker", made.tuned("weaker")):
        forge(made, cell, 0.1 + 0.001 * cell.seed, tokens=4000)
    made.evidence.refresh()
    (found,) = results(made)
    table = lengths(made, [found])
    assert table["weaker", "labels"] == (4000, pytest.approx(0.102), pytest.approx(math.nan, nan_ok=True), 1.0)
    new, labels = (found.arms[name].mean for name in ("new", "labels"))
    want = math.exp(np.interp(-new, [-labels, -0.102], np.log([1000, 4000]))) / 1000
    assert table["size", "new"].times == pytest.approx(want) and "weaker" not in missing(made)
    lab_page.write(made)
    assert "| weaker | 4,000 | labels | 0.1020 |  | 1.00 times |" in (tmp_path / "quick.md").read_text()


# ---------------------------------------------------------------- rules


def problems(*overrides):
    with pytest.raises(ConfigError) as caught:
        resolve(["job=lab", *overrides])
    return caught.value.problems


def test_an_unknown_study_is_one_error_that_lists_those_there_are():
    assert problems("study=nothing") == ["study is nothing; allowed: length, quick, regimes"]
    assert problems() == ["study is null; job=lab runs one: allowed: length, quick, regimes"]


def test_faults_of_a_study_are_named():
    assert problems("study=quick", "lab.only=[sise]")[0].startswith("lab.only has sise; allowed: size, time")
    assert problems("study=quick", "lab.only_arms=[labels,knew]")[0].startswith("lab.only_arms has knew; allowed:")
    assert problems("study=quick", "lab.only_arms=[labels,constant]") == ["lab.arms has 0 of kind new; one is needed"]
    assert problems("study=quick", "lab.first_seed=100", "lab.pairs=9")[0].startswith("lab.tuning_seeds has 101;")
    assert problems("study=quick", "lab.pairs=1") == ["lab.pairs is 1; an interval takes at least 2"]
    cached = problems("study=quick", "lab.regimes.size.labels_only=true", "lab.arms.labels.set={student.cached: true}")
    assert "lab.regimes.size.labels_only is true; arm labels reads a cache of its teacher" in cached
    wrong = problems("study=quick", "+lab.regimes.size.set={student.optim.rate: 1, seed: 3, student.optim.lr: -1}")
    assert wrong[0].startswith("lab.regimes.size.set: student.optim.rate is no key; allowed there: betas,")
    assert wrong[1:] == ["lab.regimes.size.set: seed is set by the lab"]
    regimes = ("size", "time", "both", "weaker", "finished", "replaced", "mixture")
    assert problems("study=quick", "+lab.arms.shuffled.set={student.optim.lr: -1.0}") == [
        f"lab.regimes.{regime}: arm shuffled: student.optim.lr is -1.0; it must be positive" for regime in regimes
    ]


def test_grids_of_one_study_are_of_one_size():
    (problem,) = problems("study=quick", "lab.arms.new.grid={student.weighting.alpha: [0.1, 0.2, 0.3]}")
    assert problem.startswith("lab.arms have grids of different size (labels 2, constant 2, new")


def test_changes_take_effect_as_from_the_command_line():
    config = resolve(["job=lab", "study=quick"])
    student = student_of(config, "replaced", "constant", {"student.optim.lr": 1, "student.replay.order": "same"}, 7)
    assert (student.seed, student.data.seed, student.data.corpora["main"].law.draw, student.job) == (7, 7, 7, "student")
    same = resolve(["job=lab", "study=quick", "student.optim.lr=1", "student.replay.order=same"])
    assert student.student == same.student
    more = changed(config, {"data.corpora.easy.law.symbols": 5, "student.model.moe_layers": [0]})
    assert more.data.corpora["easy"].law.symbols == 5 and more.student.model.moe_layers == [0]


# ---------------------------------------------------------------- what is committed


@cache
def in_study(name):
    return Study(resolve(["job=lab", f"study={name}", "tracking=off"]))


def digest_of_today(name, line):
    if name == "precision":
        return precision.key_of(precision.config_of(line["seed"], line["width"], line["precision"]))["config"]
    return in_study(name).cell(*(line[key] for key in ("regime", "arm", "setting", "seed", "phase"))).digest


@pytest.mark.parametrize("name", ["regimes", "length", "precision"])
def test_committed_lines_are_those_of_todays_configurations(name, monkeypatch):
    """Else a study would begin again; a key that is new takes no part at the value that it had in effect before."""
    monkeypatch.setattr(evidence, "sys", SimpleNamespace(version="3.11.7"))  # whose standard library was the text
    lines = [json.loads(text) for text in Path(f"docs/evidence/{name}.jsonl").read_text().splitlines()]
    if name == "precision":  # a configuration takes most of a second
        lines = [line for line in lines if line["seed"] == 0]
    lost = [line for line in lines if digest_of_today(name, line) != line["config"]]
    assert lines and not lost
