"""A user's factor that does not do what it promises is an error that names its key and the value."""

import json
import math

import pytest
import torch

from distill.config import registry
from distill.config.errors import ConfigError
from losses.weighting import Mean
from student.checked_factor import RUN_METRICS
from tests.cli import TINY, rows, run, write_corpus
from tests.unit.test_student_distilling import batch, recipe
from tests.unit.test_student_distilling import run as forward


class Constant:
    """`by`, by default with a metric of its own."""

    reads_label = False

    def __init__(self, setting, options):
        self.by, self.metric = options["by"], options.get("metric", "constant")

    def init(self):
        return {}

    def observe(self, state, signals, total):
        return state

    def value(self, state, signals):
        return torch.full((len(signals.entropy_T),), self.by) if isinstance(self.by, float) else torch.ones(self.by)

    def sums(self, state, signals):
        return torch.zeros(0, dtype=torch.float64)

    def update(self, state, sums):
        return state

    def metrics(self, state, signals, value_T):
        return {self.metric: Mean(1.0, 1.0)}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(registry.FACTORS, "_entries", registry.FACTORS._entries | {"one": Constant, "two": Constant})


def weighed(**plugins):
    student, b = recipe(plugins=plugins), batch([3.0, math.nan])
    forward(student, b)
    return student


def problem(function, *arguments, **keywords):
    with pytest.raises(ConfigError) as caught:
        function(*arguments, **keywords)
    (line,) = caught.value.problems
    return line


@pytest.mark.parametrize("value, text", [(4.0, "4"), (-0.5, "-0.5"), (math.nan, "nan"), (math.inf, "inf")])
def test_a_value_outside_of_0_and_1(value, text):
    student = weighed(one={"by": 0.5}, two={"by": value, "metric": "other"})
    line = problem(student.metrics)
    assert line == f"student.weighting.plugins.two: the factor's value was {text}; allowed: 0 to 1"
    assert student.metrics() == {}  # of each interval by itself


@pytest.mark.parametrize("value", [0.0, 1.0, 1.000001])
def test_a_value_within(value):
    assert weighed(one={"by": value}).metrics() == {}


def test_a_value_of_another_shape():
    line = problem(weighed, one={"by": 3})
    assert line == (
        "student.weighting.plugins.one: the factor's value has shape [3]; it must be [8], a number for each token"
    )


def test_a_missing_option():
    line = problem(recipe, plugins={"one": {"bye": 1.0, "metric": "m"}})
    assert line == (
        "student.weighting.plugins.one.by has no value; allowed below student.weighting.plugins.one: by; given: bye, "
        "metric"
    )


@pytest.mark.parametrize("name", ["alpha", "two_factor", "grad_norm", "tokens"])
def test_a_metric_of_the_run(name):
    line = problem(weighed, one={"by": 1.0, "metric": name})
    assert line == (
        f"student.weighting.plugins.one: the factor's metric {name} is one of the run itself; give it another name"
    )


def test_a_metric_of_another_factor():
    line = problem(weighed, one={"by": 1.0}, two={"by": 1.0})
    assert "plugins.two: the factor's metric constant is one of student.weighting.plugins.one;" in line


def test_all_metrics_of_a_run_are_taken(tmp_path):
    """Of a student with every factor and penalty."""
    common = [*TINY, write_corpus(tmp_path / "text"), "tracking=off", f"data.dir={tmp_path}/data"]
    run(*common, "job=teacher", "teacher.train.steps=4", f"hydra.run.dir={tmp_path}/t")
    run(*common, "job=student", "student.train.steps=8", f"hydra.run.dir={tmp_path}/s", f"cache.dir={tmp_path}/t/cache",
        "student.weighting.entropy.enabled=true", "student.weighting.entropy.scale=true",
        "student.weighting.disagreement.enabled=true",
        "student.train.balance_loss=0.01", "student.train.z_loss=0.01")  # fmt: skip
    logged = {name for row in rows(tmp_path / "s") for name in row}
    assert len(logged) > 20 and logged <= RUN_METRICS | {"lag_factor", "entropy_factor", "disagreement_factor"}
    assert json.loads((tmp_path / "s" / "summary.json").read_text())["coverage"] > 0
