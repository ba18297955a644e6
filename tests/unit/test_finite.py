"""What is not finite: seen in tensors and steps, spelt as null in JSON."""

import json
import math

import numpy as np
import pytest
import torch

from distill.config import json_text
from distill.engine.dist import Dist
from distill.engine.watch import Watch
from distill.model.finite import is_finite
from student.evaluate import _evaluation
from student.positions import STARTS

INF, NAN = math.inf, math.nan


def test_json_has_null_and_nothing_else_changes():
    data = {"a": [1, 0.1, -0.0, 1e308, True, None, "NaN", (2, INF)], "b": {"c": NAN, "d": {"e": [[-INF]]}}, "f": {}}
    text = json_text.dumps(data)

    def refuse(name):
        raise AssertionError(name)

    found = json.loads(text, parse_constant=refuse)
    want = {"a": [1, 0.1, -0.0, 1e308, True, None, "NaN", [2, None]], "b": {"c": None, "d": {"e": [[None]]}}, "f": {}}
    assert found == want and math.copysign(1, found["a"][2]) == -1
    finite = {"x": [1.5, {"y": 3}], "z": "ü"}
    assert json_text.dumps(finite, indent=1) == json.dumps(finite, indent=1)
    assert json_text.dumps(np.float64(NAN)) == "null" and json_text.dumps(np.float64(0.25)) == "0.25"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_any_element_of_any_kind_of_tensor(dtype):
    values = torch.linspace(-400, 400, 1001).to(dtype)
    assert is_finite(values) and is_finite(values[:0]) and is_finite(values.view(7, 143).T)
    for place in (0, 500, 1000):
        for bad in (NAN, INF, -INF):
            broken = values.clone()
            broken[place] = bad
            if dtype is torch.float8_e4m3fn and not math.isnan(bad):
                continue  # it has no infinity
            assert not is_finite(broken), (place, bad)
    assert is_finite(torch.full((9,), torch.finfo(torch.float32).max)) and is_finite(torch.arange(3))


def test_a_watch_keeps_the_first_step():
    yes, no, dist = torch.tensor(True), torch.tensor(False), Dist(0, 1, torch.device("cpu"))
    watch = Watch(dist)
    watch.note(1, yes, yes, yes)
    assert watch.good and watch.problem() is None
    watch.note(4, yes, no, no)
    watch.note(5, no, no, yes)
    assert not watch.good and watch.problem() == "gradient norm and weights are not finite at step 4"
    for flags, text in (
        ((no, yes, yes), "loss is"),
        ((yes, no, yes), "gradient norm is"),
        ((yes, yes, no), "weights are"),
        ((no, no, no), "loss, gradient norm and weights are"),
    ):
        watch = Watch(dist)
        watch.note(9, *flags)
        watch.note(10, no, no, no)
        assert watch.problem() == f"{text} not finite at step 9"


def test_what_another_rank_saw_counts():
    class Pair(Dist):
        def least(self, tensor):
            return tensor.copy_(torch.minimum(tensor, torch.tensor([3, 2**63 - 1, 2**63 - 1])))

    yes, watch = torch.tensor(True), Watch(Pair(0, 2, torch.device("cpu")))
    watch.note(7, yes, yes, ~yes)
    assert watch.problem() == "loss is not finite at step 3"
    assert watch.problem() == "loss is not finite at step 3" and not watch.good


@pytest.mark.parametrize(
    ("loss", "taught", "want"),
    [(2.0, 1.0, (2.0, math.e**2, 0.5)), (1000.0, 1.0, (1000.0, INF, 0.5)), (INF, 1.0, (INF, INF, 0.5)),
     (NAN, 1.0, (NAN, NAN, 0.5)), (2.0, INF, (2.0, math.e**2, NAN)), (2.0, NAN, (2.0, math.e**2, NAN))],
)  # fmt: skip
def test_an_evaluation_of_any_loss(loss, taught, want):
    """Four tokens, two of them alike. A loss of 1,000 nats is a number; its perplexity is none."""
    sums_5 = torch.tensor([4 * loss, 4.0, 1.0, 2.0, taught], dtype=torch.float64)
    found = _evaluation(
        True, {}, sums_5, torch.ones(3, 2, dtype=torch.float64), torch.zeros(2, len(STARTS), dtype=torch.float64)
    )
    assert (found.loss, found.perplexity, found.agreement) == pytest.approx(want, nan_ok=True)
