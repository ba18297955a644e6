import json
import math
from types import SimpleNamespace

import pytest
import torch

from losses import weighting
from losses.calibration import bin_confidence, expected_calibration_error
from losses.factors import Entropy, Lag
from losses.schedule import schedule
from losses.weighting import Setting, Signals, Weighting

V = 512
NAN = float("nan")


@pytest.mark.parametrize(
    ("kind", "step", "want"),
    [
        ("constant", 70, 0.8),
        ("linear", 0, 0.8),
        ("linear", 50, 0.5),
        ("linear", 100, 0.2),
        ("cosine", 50, 0.5),
        ("cosine", 100, 0.2),
        ("wsd", 0, 0.0),
        ("wsd", 12.5, 0.4),
        ("wsd", 50, 0.8),
        ("wsd", 87.5, 0.5),
        ("wsd", 100, 0.2),
        ("step", 0, 0.8),
        ("step", 74.5, 0.8),
        ("step", 75, 0.2),
        ("step", 100, 0.2),
    ],
)
def test_schedule_by_hand(kind, step, want):
    warmup = 25 if kind == "wsd" else 0
    assert schedule(kind, step, 100, peak=0.8, final=0.2, warmup=warmup, decay=25) == pytest.approx(want)


def test_a_schedule_may_begin_one_step_up_and_never_fall():
    assert schedule("wsd", 0, 100, peak=0.8, final=0.0, warmup=4, decay=0, first=1) == pytest.approx(0.2)
    assert schedule("wsd", 100, 100, peak=0.8, final=0.0, warmup=4, decay=0, first=1) == 0.8


def lag(power=1.0, smoothing=0.98, best=(math.inf,)):
    setting = Setting(V, V, torch.tensor(best, dtype=torch.float64))
    return Lag(setting, SimpleNamespace(power=power, smoothing=smoothing))


def entropy(scale=False, skip=0.0):
    setting = Setting(V, V, torch.tensor([math.inf], dtype=torch.float64))
    return Entropy(setting, SimpleNamespace(scale=scale, skip=skip))


def state(student, best):
    return {"student_loss": torch.tensor([student]).double(), "best_teacher_loss": torch.tensor([best]).double()}


def signals(shard_loss, entropy_T=None, covered_T=None):
    loss_B = torch.tensor(shard_loss)
    entropy_T = torch.ones(len(loss_B)) if entropy_T is None else entropy_T
    covered_T = torch.ones(len(entropy_T), dtype=torch.bool) if covered_T is None else covered_T
    return Signals(torch.zeros(len(loss_B), dtype=torch.int64), loss_B, entropy_T, covered_T)


def alone(tensor):
    return tensor


def test_lag_is_one_at_the_best_shard_and_zero_where_the_student_is_ahead():
    shards = signals([3.0, 3.5, 4.0, 5.0, NAN])
    assert lag().value(state(4.0, 3.0), shards).tolist() == [1.0, 0.5, 0.0, 0.0, 0.0]
    assert lag(power=0.5).value(state(4.0, 3.0), shards)[1] == pytest.approx(math.sqrt(0.5))


def test_a_student_ahead_of_every_teacher_gets_no_soft_loss():
    assert not lag().value(state(2.5, 2.9), signals([3.0, 2.9])).any()
    assert not lag().value(state(3.0, 3.0), signals([3.0])).any()


def test_lag_is_of_a_sample_and_its_tokens():
    tokens = signals([3.0, 3.5], entropy_T=torch.ones(6))
    assert lag().value(state(4.0, 3.0), tokens).tolist() == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5]
    one = signals([3.5, NAN])
    found = lag().metrics(state(4.0, 3.0), one, lag().value(state(4.0, 3.0), one))
    assert {name: float(mean.sum / mean.weight) for name, mean in found.items()} == {
        "lag_factor": 0.5, "lag": 0.5, "student_loss": 4.0,
    }  # fmt: skip


def test_lag_state_moves_by_hand():
    factor = lag(smoothing=0.75)
    s = factor.init()
    assert s["student_loss"].item() == pytest.approx(math.log(V)) and torch.isinf(s["best_teacher_loss"])
    assert not factor.value(s, signals([NAN])).any()
    for loss in (4.0, NAN, 5.0):
        s = factor.observe(s, signals([loss]), alone, alone)
    assert s["best_teacher_loss"] == 4.0
    s = factor.update(s, torch.tensor([2.0]))
    assert s["student_loss"].item() == pytest.approx(0.75 * math.log(V) + 0.5)
    assert factor.update(s, torch.tensor([NAN])) == s
    assert lag(best=(2.5,)).init()["best_teacher_loss"] == 2.5


def test_entropy_skips_at_most_its_share_of_the_lowest():
    g = torch.Generator().manual_seed(0)
    entropy_T = torch.rand(1000, generator=g) * math.log(V)
    factor, tokens = entropy(skip=0.15), signals([3.0], entropy_T)
    dropped = factor.value(factor.observe(factor.init(), tokens, alone, alone), tokens) == 0
    assert 0.13 <= dropped.float().mean() <= 0.15
    assert entropy_T[dropped].max() <= entropy_T[~dropped].min()


def test_entropy_share_is_the_global_batch_whatever_the_cut():
    entropy_T = torch.linspace(0, math.log(V), 64)
    covered_T = torch.arange(64) % 3 > 0
    factor, counts = entropy(skip=0.5), []
    whole = factor.observe(factor.init(), signals([3.0], entropy_T, covered_T), alone, alone)
    for e, c in zip(entropy_T.split(10), covered_T.split(10)):  # as if each were of another rank
        factor.observe(factor.init(), signals([3.0], e, c), lambda part: counts.append(part) or part, alone)
    last = signals([3.0], entropy_T[60:], covered_T[60:])
    parts = factor.observe(factor.init(), last, lambda part: sum(counts), alone)
    assert parts["first_kept"] == whole["first_kept"] > 0


def test_entropy_scale_is_entropy_over_log_vocabulary():
    tokens = signals([3.0], torch.tensor([0.0, math.log(V) / 2, math.log(V)]))
    assert entropy(scale=True).value({}, tokens).tolist() == pytest.approx([0.0, 0.5, 1.0])


def test_a_weighting_is_the_product_and_its_state_survives_json():
    both = Weighting(lambda step: 0.5, {"lag": lag(), "entropy": entropy(scale=True, skip=0.1)})
    tokens = signals([3.5], torch.tensor([math.log(V) / 2]))
    s = both.init() | {"lag": state(4.0, 3.0)}
    assert both.weigh(s, 0, tokens, torch.tensor([True])).alpha_T.item() == pytest.approx(0.5 * 0.5 * 0.5)
    assert both.weigh(s, 0, tokens, torch.tensor([False])).alpha_T.item() == 0.0
    s = both.observe(both.init(), tokens, alone, alone)
    again = weighting.from_json(json.loads(json.dumps(weighting.to_json(s))), both.init())
    assert again == s and again["entropy"]["first_kept"].dtype == torch.int64


def test_calibration_error_by_hand():
    # Two bins: [0, .5) has confidence 0.4, hits 1 of 2; [.5, 1] has 0.9, hits 1 of 2.
    confidence_T = torch.tensor([0.4, 0.4, 0.9, 0.9])
    correct_T = torch.tensor([True, False, True, False])
    halves = [bin_confidence(confidence_T[i : i + 2], correct_T[i : i + 2], 2) for i in (0, 2)]
    assert expected_calibration_error(sum(halves)).item() == pytest.approx((0.1 + 0.4) / 2)
