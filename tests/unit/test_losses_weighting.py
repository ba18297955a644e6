import math

import pytest
import torch

from losses import weighting as w
from losses.calibration import bin_confidence, expected_calibration_error


def value(kind, progress, peak=0.8, final=0.2, warmup=0.25, decay=0.25):
    return w.schedule(kind, progress, peak=peak, final=final, warmup=warmup, decay=decay)


@pytest.mark.parametrize(
    ("kind", "progress", "want"),
    [
        ("constant", 0.7, 0.8),
        ("linear", 0.0, 0.8),
        ("linear", 0.5, 0.5),
        ("linear", 1.0, 0.2),
        ("cosine", 0.5, 0.5),
        ("cosine", 1.0, 0.2),
        ("wsd", 0.125, 0.4),
        ("wsd", 0.5, 0.8),
        ("wsd", 0.875, 0.5),
        ("wsd", 1.0, 0.2),
    ],
)
def test_schedule_by_hand(kind, progress, want):
    assert value(kind, progress) == pytest.approx(want)


def state(student, best):
    return w.LagState(torch.tensor(student, dtype=torch.float64), torch.tensor(best, dtype=torch.float64))


def test_lag_is_one_at_the_best_shard_and_zero_where_the_student_is_ahead():
    shard_B = torch.tensor([3.0, 3.5, 4.0, 5.0, float("nan")])
    factor_B = w.lag_factor(shard_B, state(4.0, 3.0), power=1.0)
    assert factor_B.tolist() == [1.0, 0.5, 0.0, 0.0, 0.0]
    assert w.lag_factor(shard_B, state(4.0, 3.0), power=0.5)[1] == pytest.approx(math.sqrt(0.5))


def test_a_student_ahead_of_every_teacher_gets_no_soft_loss():
    assert not w.lag_factor(torch.tensor([3.0, 2.9]), state(2.5, 2.9), power=0.5).any()
    assert not w.lag_factor(torch.tensor([3.0]), state(3.0, 3.0), power=0.5).any()


def test_lag_state_moves_by_hand():
    s = w.init_lag(512)
    assert s.student_loss == pytest.approx(math.log(512)) and torch.isinf(s.best_teacher_loss)
    assert not w.lag_factor(torch.tensor([float("nan")]), s, 0.5).any()
    s = w.meet(s, torch.tensor(4.0))
    s = w.meet(s, torch.tensor(float("nan")))
    s = w.meet(s, torch.tensor(5.0))
    assert s.best_teacher_loss == 4.0
    s = w.update_lag(s, torch.tensor(2.0), smoothing=0.75)
    assert s.student_loss == pytest.approx(0.75 * math.log(512) + 0.5)


def test_entropy_skips_at_most_its_share_of_the_lowest():
    g = torch.Generator().manual_seed(0)
    entropy_T = torch.rand(1000, generator=g) * math.log(512)
    histogram = w.entropy_histogram(entropy_T, torch.ones(1000, dtype=torch.bool), 512)
    factor_T = w.entropy_factor(entropy_T, 512, scale=False, skip=0.15, histogram=histogram)
    dropped = factor_T == 0
    assert 0.13 <= dropped.float().mean() <= 0.15
    assert entropy_T[dropped].max() <= entropy_T[~dropped].min()


def test_entropy_share_is_the_global_batch_whatever_the_cut():
    entropy_T = torch.linspace(0, math.log(512), 64)
    counted_T = torch.arange(64) % 3 > 0
    whole = w.entropy_histogram(entropy_T, counted_T, 512)
    parts = sum(w.entropy_histogram(e, c, 512) for e, c in zip(entropy_T.split(10), counted_T.split(10)))
    assert torch.equal(whole, parts) and whole.sum() == counted_T.sum()


def test_entropy_scale_is_entropy_over_log_vocabulary():
    entropy_T = torch.tensor([0.0, math.log(512) / 2, math.log(512)])
    assert w.entropy_factor(entropy_T, 512, scale=True, skip=0.0).tolist() == pytest.approx([0.0, 0.5, 1.0])


def test_calibration_error_by_hand():
    # Two bins: [0, .5) says 0.4, hits 1 of 2; [.5, 1] says 0.9, hits 1 of 2.
    confidence_T = torch.tensor([0.4, 0.4, 0.9, 0.9])
    correct_T = torch.tensor([True, False, True, False])
    halves = [bin_confidence(confidence_T[i : i + 2], correct_T[i : i + 2], 2) for i in (0, 2)]
    assert expected_calibration_error(sum(halves)).item() == pytest.approx((0.1 + 0.4) / 2)
