import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from losses import weighting
from losses.calibration import bin_confidence, expected_calibration_error
from losses.factors import Disagreement, Entropy, LabelGap, Lag, Variance
from losses.schedule import schedule
from losses.shard_lag import ShardLag
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


def setting(corpora=1, tokens=1000, draws=math.inf):
    return Setting(V, V, corpora, tokens, draws, torch.device("cpu"))


def lag(power=1.0, memory=0.01, corpora=1):
    return Lag(setting(corpora), SimpleNamespace(power=power, memory=memory))


def entropy(scale=False, skip=0.0):
    return Entropy(setting(), SimpleNamespace(scale=scale, skip=skip))


def place(*losses):
    """The state of a student that is at these losses on its corpora's curves."""
    return {"place": torch.tensor([[2.0 * loss, 2.0] for loss in losses], dtype=torch.float64)}


def signals(size, **given):
    """Signals of tokens, 0 but for what is given."""
    parts = {name: torch.zeros(size) for name in Signals._fields} | {
        "corpus_T": torch.zeros(size, dtype=torch.int64),
        "covered_T": torch.ones(size, dtype=torch.bool),
        "par_T": torch.full((size,), math.inf),
        "lr_share": 1.0,
    }
    for name, value in given.items():
        parts[name] = value if isinstance(value, float) else torch.as_tensor(value)
    return Signals(**parts)


def alone(tensor):
    return tensor


def test_lag_is_one_at_the_teachers_end_and_zero_where_the_student_is_ahead():
    tokens = signals(5, level_T=[3.0, 3.5, 4.0, 5.0, NAN], end_T=[3.0, 3.0, 3.0, 3.0, NAN])
    assert lag().value(place(4.0), tokens).tolist() == [1.0, 0.5, 0.0, 0.0, 0.0]
    assert lag(power=0.5).value(place(4.0), tokens)[1] == pytest.approx(math.sqrt(0.5))
    # An untrained student is at log V.
    first = lag().value(lag().init(), signals(1, level_T=[4.0], end_T=[2.0])).item()
    assert first == pytest.approx((math.log(V) - 4) / (math.log(V) - 2), rel=1e-6)


def test_a_student_ahead_of_every_teacher_gets_no_soft_loss():
    assert not lag().value(place(2.5), signals(2, level_T=[3.0, 2.9], end_T=[2.9, 2.9])).any()
    assert not lag().value(place(3.0), signals(1, level_T=[3.0], end_T=[3.0])).any()


def test_targets_from_before_a_teacher_diverged_count_until_the_student_is_at_their_level():
    tokens = signals(2, level_T=[3.0, 7.0], end_T=[8.0, 8.0])
    assert [lag().value(place(s), tokens).tolist() for s in (9.0, 5.0, 3.0)] == [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]


def test_a_corpus_without_targets_for_long_keeps_its_place():
    factor, s = lag(memory=0.001, corpora=2), place(3.0, 2.0)
    tokens = signals(4, student_loss_T=[2.5] * 4)
    for _ in range(400):  # in all 1,600 times the memory
        s = factor.update(s, factor.sums(s, tokens))
    ends = signals(2, corpus_T=[0, 1], level_T=[2.0, 1.5], end_T=[2.0, 1.0])
    assert factor.value(s, ends).tolist() == pytest.approx([1.0, 0.5])
    assert s["place"][0].tolist() == pytest.approx([10.0, 4.0], rel=0.05)  # what is read fades as it should


def test_a_student_counts_as_no_worse_than_its_teacher_after_as_many_tokens():
    """In the teacher's own order targets are as old as the student: they have nothing that labels lack."""
    tokens = signals(4, level_T=[3.0, 3.5, 4.0, 3.5], end_T=[3.0] * 4, par_T=[3.5, 3.5, 3.5, NAN])
    assert lag().value(place(5.0), tokens).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert lag().value(place(3.25), signals(1, level_T=[3.125], end_T=[3.0], par_T=[3.5])).item() == 0.5


def test_a_student_s_place_is_the_mean_difference_on_the_same_tokens():
    """Text that is two nats easier for both moves nothing; what has no level, or no target, does not count."""
    factor = lag(memory=0.01)  # of 1,000 tokens: ten
    hard = signals(4, student_loss_T=[4.0, 5.0, 9.0, 9.0], teacher_loss_T=[3.0, 4.5, 0.0, 0.0],
                   level_T=[3.5, 3.5, NAN, 3.5], covered_T=[True, True, True, False])  # fmt: skip
    easy = hard._replace(student_loss_T=hard.student_loss_T - 2, teacher_loss_T=hard.teacher_loss_T - 2)
    s = factor.update(factor.init(), factor.sums(factor.init(), hard))
    assert s["place"].tolist() == [[pytest.approx(1.5 + 7.0), 2.0]]
    t = factor.update(s, factor.sums(s, easy))
    assert (t["place"][:, 0] / t["place"][:, 1]).item() == pytest.approx(4.25)
    assert t["place"][0, 1].item() == pytest.approx(2 + 2 * math.exp(-0.2))
    assert factor.metrics(t, easy, torch.ones(4))["student_place"].sum == pytest.approx(4.25)


def test_a_student_s_place_counts_tokens_and_not_steps():
    factor, g = lag(memory=0.2), torch.Generator().manual_seed(0)
    tokens = signals(96, student_loss_T=3 + torch.rand(96, generator=g), level_T=torch.full((96,), 2.0))
    ends = []
    for size in (8, 32):
        s = factor.init()
        for start in range(0, 96, size):
            s = factor.update(s, factor.sums(s, tokens.rows(slice(start, start + size))))
        ends.append((s["place"][0, 0] / s["place"][0, 1]).item())
    assert ends[0] == pytest.approx(ends[1], abs=0.01)


def test_each_corpus_has_its_own_place():
    factor = lag(corpora=2)
    tokens = signals(4, corpus_T=[0, 1, 0, 1], level_T=[3.0, 0.5, 2.0, 0.25], end_T=[2.0, 0.25, 2.0, 0.25])
    assert factor.value(place(4.0, 1.0), tokens).tolist() == pytest.approx([0.5, 2 / 3, 1.0, 1.0])
    sums = factor.sums(factor.init(), tokens._replace(student_loss_T=torch.tensor([1.0, 2.0, 3.0, 4.0])))
    assert sums.tolist() == [[1 + 3 + 3 + 2, 2], [2 + 0.5 + 4 + 0.25, 2]]


@pytest.mark.parametrize("n", [1.0, 16.0, 256.0])
def test_variance_is_the_weight_of_least_squared_error(n):
    """Against the mean squared error of m = a t + (1 - a) (mean of n labels), by simulation over a grid of a."""
    rng = np.random.default_rng(0)
    size, draws = 64, 20
    q = np.full(size, 1 / size)  # the entropy gives the variance of a label exactly
    shift = rng.standard_normal(size)
    t = q + 0.15 * (shift - shift.mean()) / size
    bias = ((t - q) ** 2).sum()
    labels = rng.multinomial(int(n), q, 4000) / n
    drawn = rng.multinomial(int(draws * n), t, 4000) / (draws * n)
    grid = np.linspace(0, 1, 101)
    errors = [((a * drawn + (1 - a) * labels - q) ** 2).sum(1).mean() for a in grid]
    factor = Variance(setting(draws=draws), SimpleNamespace(labels=n))
    tokens = signals(1, entropy_T=[math.log(size)], level_T=[2.0 + bias], end_T=[2.0])
    assert factor.value({}, tokens).item() == pytest.approx(grid[np.argmin(errors)], abs=0.04)


def test_variance_trusts_labels_more_as_the_learning_rate_falls_and_where_they_are_certain():
    factor = Variance(setting(), SimpleNamespace(labels=1.0))
    tokens = signals(3, entropy_T=[2.0, 2.0, 0.0], level_T=[2.5, 2.0, 2.5], end_T=[2.0, 2.0, 2.0])
    peak, late = (factor.value({}, tokens._replace(lr_share=share)) for share in (1.0, 0.1))
    assert late[0] < peak[0] < 1 and late[1] == peak[1] == 1.0 and peak[2] == 0.0


def test_disagreement_and_label_gap_by_hand():
    tokens = signals(4, disagreement_T=[-0.2, 0.0, 0.1, 0.3])
    assert Disagreement(setting(), SimpleNamespace(half=0.1)).value({}, tokens).tolist() == pytest.approx(
        [0.0, 0.0, 0.5, 0.75]
    )
    gap = LabelGap(setting(), SimpleNamespace(margin=0.5, width=2.0))
    tokens = signals(2, student_loss_T=[3.0, 3.0], teacher_loss_T=[2.5, 0.5])
    assert gap.value({}, tokens).tolist() == pytest.approx([0.5, 1 / (1 + math.exp(-1))])


def test_a_factor_that_reads_the_label_leaves_the_hard_weight_alone():
    gap = LabelGap(setting(), SimpleNamespace(margin=0.0, width=1.0))
    both = Weighting(lambda step: 0.8, {"lag": lag(), "label_gap": gap})
    tokens = signals(2, level_T=[3.5, 3.5], end_T=[3.0, 3.0], covered_T=[True, False])
    weights = both.weigh({"lag": place(4.0), "label_gap": {}}, 0, tokens)
    assert weights.soft_t.tolist() == pytest.approx([0.8 * 0.5 * 0.5, 0.0])
    assert weights.hard_t.tolist() == pytest.approx([1 - 0.8 * 0.5, 1.0])


def test_entropy_skips_at_most_its_share_of_the_lowest():
    g = torch.Generator().manual_seed(0)
    entropy_T = torch.rand(1000, generator=g) * math.log(V)
    factor, tokens = entropy(skip=0.15), signals(1000, entropy_T=entropy_T)
    dropped = factor.value(factor.observe(factor.init(), tokens, alone), tokens) == 0
    assert 0.13 <= dropped.float().mean() <= 0.15
    assert entropy_T[dropped].max() <= entropy_T[~dropped].min()


def test_entropy_share_is_the_global_batch_whatever_the_cut():
    entropy_T = torch.linspace(0, math.log(V), 64)
    covered_T = torch.arange(64) % 3 > 0
    factor, counts = entropy(skip=0.5), []
    whole = factor.observe(factor.init(), signals(64, entropy_T=entropy_T, covered_T=covered_T), alone)
    for e, c in zip(entropy_T.split(10), covered_T.split(10)):  # as if each were of another rank
        factor.observe(
            factor.init(), signals(len(e), entropy_T=e, covered_T=c), lambda part: counts.append(part) or part
        )
    last = signals(4, entropy_T=entropy_T[60:], covered_T=covered_T[60:])
    parts = factor.observe(factor.init(), last, lambda part: sum(counts))
    assert parts["first_kept"] == whole["first_kept"] > 0


def test_entropy_scale_is_entropy_over_log_vocabulary():
    tokens = signals(3, entropy_T=[0.0, math.log(V) / 2, math.log(V)])
    assert entropy(scale=True).value({}, tokens).tolist() == pytest.approx([0.0, 0.5, 1.0])


def test_a_weighting_is_the_product_and_its_state_survives_json():
    both = Weighting(lambda step: 0.5, {"lag": lag(), "entropy": entropy(scale=True, skip=0.1)})
    tokens = signals(2, level_T=[3.5] * 2, end_T=[3.0] * 2, entropy_T=[math.log(V) / 2] * 2, covered_T=[True, False])
    weights = both.weigh(both.init() | {"lag": place(4.0)}, 0, tokens)
    assert weights.soft_t.tolist() == pytest.approx([0.5 * 0.5 * 0.5, 0.0])
    assert weights.hard_t.tolist() == pytest.approx([1 - 0.5 * 0.5 * 0.5, 1.0])
    s = both.observe(both.init(), tokens, alone) | {"lag": place(4.0)}
    again = weighting.from_json(json.loads(json.dumps(weighting.to_json(s))), both.init())
    assert again["lag"]["place"].equal(s["lag"]["place"]) and again["entropy"] == s["entropy"]
    assert again["entropy"]["first_kept"].dtype == torch.int64


def test_calibration_error_by_hand():
    # Two bins: [0, .5) has confidence 0.4, hits 1 of 2; [.5, 1] has 0.9, hits 1 of 2.
    confidence_T = torch.tensor([0.4, 0.4, 0.9, 0.9])
    correct_T = torch.tensor([True, False, True, False])
    halves = [
        bin_confidence(confidence_T[i : i + 2], correct_T[i : i + 2], torch.ones(2, dtype=torch.bool), 2)
        for i in (0, 2)
    ]
    assert expected_calibration_error(sum(halves)).item() == pytest.approx((0.1 + 0.4) / 2)


def test_the_old_lag_by_hand():
    """The least shard met, a running average over steps; whatever had no targets counts as nothing."""
    factor = ShardLag(setting(), {"power": 1.0, "smoothing": 0.75})
    tokens = signals(4, shard_loss_T=[3.0, 3.5, 5.0, NAN], covered_T=[True, True, True, False])
    s = factor.observe(factor.init(), tokens, alone) | {"student": torch.tensor([4.0]).double()}
    assert factor.value(s, tokens).tolist() == [1.0, 0.5, 0.0, 0.0]
    s = factor.observe(s, signals(1, shard_loss_T=[2.0]), alone)
    assert factor.value(s, tokens).tolist() == [0.5, 0.25, 0.0, 0.0]
    sums = factor.sums(s, tokens._replace(student_loss_T=torch.tensor([2.0, 2.0, 5.0, 9.0])))
    assert factor.update(s, sums)["student"].item() == pytest.approx(0.75 * 4 + 0.25 * 3)
    assert factor.update(s, torch.zeros(2).double())["student"] == 4.0
