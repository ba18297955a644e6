"""Levels are smooth, follow the teacher's true loss, and depend on nothing but its steps."""

from types import SimpleNamespace

import numpy as np
import pytest

from distill.cache.loss_curve import LossSums
from distill.data.teacher_levels import TeacherLevels, Trend

LENGTH = 4000
T = ("teacher", "capture")


def true_loss(steps):
    """A power law, with the fall at the end of a warm-up-stable-decay rate."""
    return 1.5 + 4 * (1 + steps / 40) ** -0.6 - 0.25 * np.clip((steps - 0.7 * LENGTH) / (0.3 * LENGTH), 0, 1)


def sums(steps, noise=0.0, seed=0, tokens=64, teacher=T, offset=0.0):
    rng = np.random.default_rng(seed)
    found = LossSums()
    losses = true_loss(steps)[:, None] + offset + noise * rng.standard_normal((len(steps), tokens))
    found.add_tokens(*teacher, np.repeat(steps, tokens), losses.reshape(-1))
    return found


def reader(found, **given):
    return SimpleNamespace(
        **{"losses": found, "view": {}, "open_streams": {}, "header": SimpleNamespace(vocab_size=256)} | given
    )


def levels(found, limit=None, trains=False, pace=1.0):
    streams = {"teacher-00000": None} if trains else {}
    return TeacherLevels([reader(found, open_streams=streams)], [LENGTH], [pace], limit)


def at(these, steps, step=0, teacher=T):
    steps = np.asarray(steps)
    return these.of(step, 0, [teacher], np.zeros(len(steps), np.int64), steps)


def test_a_level_is_the_teachers_loss_without_its_noise():
    steps = np.arange(LENGTH)
    trend = Trend(sums(steps, noise=0.4, tokens=64).curve(*T), LENGTH, trains=True)
    late = steps[100:]
    assert np.abs(trend.level(late) - true_loss(late)).max() < 0.08  # a token's own noise is 0.4, a step's 0.05
    assert trend.end == pytest.approx(true_loss(np.array([LENGTH - 1]))[0], abs=0.02)
    rough = np.abs(np.diff(trend.level(steps[500:])))
    assert rough.max() < 4 * np.abs(np.diff(true_loss(steps[500:]))).max()


def test_levels_do_not_depend_on_how_the_cache_is_cut():
    """The same tokens in one sum, and in many small ones, in another order."""
    steps = np.arange(0, LENGTH, 3)
    whole = sums(steps)
    for size in (4, 64, 256):
        parts = [sums(steps[i : i + size]) for i in range(0, len(steps), size)]
        cut = LossSums.total(parts[::-1])
        a, b = (at(levels(found), steps) for found in (whole, cut))
        assert np.array_equal(a.level_B, b.level_B) and np.array_equal(a.end_B, b.end_B)


def test_a_teacher_in_training_is_seen_up_to_the_limit_alone():
    """Whatever is published beyond it; its end goes on from its slope."""
    steps = np.arange(LENGTH)
    limits = lambda step: 100 + step  # noqa: E731
    early, late = (levels(sums(steps[:count]), limit=limits) for count in (1200, LENGTH))
    for step in (0, 500, 1000):
        a, b = (at(each, [50, 90 + step], step) for each in (early, late))
        assert np.array_equal(a.level_B, b.level_B) and np.array_equal(a.end_B, b.end_B)
        assert a.end_B[0] < a.level_B[1] < a.level_B[0]
    unknown = at(levels(sums(steps), limit=lambda step: 0), [3])
    assert np.isnan(unknown.level_B).all() and np.isnan(unknown.end_B).all()


@pytest.mark.parametrize("seen", [500, 1000, 2000])
def test_the_end_of_a_power_law_is_extrapolated(seen):
    """Nearer than the level at the time, by at least two thirds of the way."""

    def law(steps):
        return 2.0 + 3.0 * (1 + steps / 30) ** -0.4

    steps = np.arange(seen)
    found = LossSums()
    found.add_tokens(*T, steps, law(steps))
    trend = Trend(found.curve(*T), LENGTH, trains=True)
    now, end = law(np.array([seen, LENGTH]))
    assert abs(trend.end - end) < (now - end) / 3


def test_the_best_of_several_teachers_ends_the_lag_of_all():
    """One that stalled, and the one that took its place, frozen at a single step."""
    steps = np.arange(1000)
    second = ("second", "backfill")
    found = LossSums.total([sums(steps), sums(np.array([10**6]), tokens=512, teacher=second, offset=-0.2)])
    these = levels(found)
    number_B, steps_B = np.array([0, 1, 0, -1]), np.array([200, 10**6, 999, -1])
    both = these.of(0, 0, [T, second], number_B, steps_B)
    best = true_loss(np.array([10**6]))[0] - 0.2
    assert both.level_B[1] == pytest.approx(best, abs=1e-5) and np.isnan(both.level_B[3])
    assert both.end_B[:3] == pytest.approx([best] * 3, abs=1e-5) and np.isnan(both.end_B[3])
    assert both.level_B[0] == pytest.approx(true_loss(np.array([200]))[0], abs=0.05)
    # A teacher of which no loss is known has no level, and takes nothing from the others.
    strange = these.of(0, 0, [("nobody", "import")], np.array([0]), np.array([5]))
    assert np.isnan(strange.level_B).all() and strange.end_B == pytest.approx([best], abs=1e-5)


@pytest.mark.parametrize("pace", [0.5, 1.0, 3.0])
def test_par_is_the_teachers_level_after_as_many_samples(pace):
    these = levels(sums(np.arange(LENGTH)), pace=pace)
    for step in (0, 10, 1000):
        found = at(these, [step * pace, 3 * step * pace], step)
        assert found.par_B[0] == found.par_B[1] == found.level_B[0]
    assert at(these, [9], step=10**6).par_B[0] == pytest.approx(true_loss(np.array([LENGTH]))[0], abs=0.02)


def test_par_is_known_from_the_first_step_of_a_follower_on():
    """Its teacher's curve ends where it begins then."""
    these = levels(sums(np.arange(10)), limit=lambda step: step + 1)
    assert all(np.isfinite(at(these, [step], step).par_B).all() for step in range(10))


def test_par_is_that_of_teachers_whose_beginning_was_captured():
    steps, late = np.arange(1000), np.arange(600, 1000)
    assert np.isinf(at(levels(sums(steps), pace=np.nan), [5]).par_B).all()
    assert np.isinf(at(levels(sums(steps, offset=-3.0)), [5]).par_B).all()  # began with weights that knew much
    second, backfill = ("second", "capture"), ("teacher@1000", "backfill")
    found = LossSums.total([sums(steps), sums(late, teacher=second), sums(np.array([1000]), teacher=backfill)])
    numbers_B, steps_B = np.array([0, 1, 2, -1]), np.array([700, 700, 1000, -1])
    par_B = levels(found).of(700, 0, [T, second, backfill], numbers_B, steps_B).par_B
    alone = at(levels(sums(steps)), [700], 700).par_B[0]
    assert par_B[0] == par_B[1] == alone and np.isinf(par_B[2]) and np.isnan(par_B[3])


def test_one_bin_is_a_level():
    trend = Trend(sums(np.array([0])).curve(*T), LENGTH, trains=True)
    assert trend.level(np.array([0, 7])).tolist() == [trend.end] * 2


@pytest.mark.parametrize("steps", [[*range(10), *range(600, 1000)], [3, 40, 41, 80]])
def test_no_curve_leaves_the_losses_around_a_gap(steps):
    """Of a corpus that is rare, or a cache that lacks a part of the teacher's steps."""
    curve = sums(np.array(steps), noise=0.5).curve(*T)
    trend = Trend(curve, steps[-1] + 1, trains=True)
    within = trend.level(np.arange(steps[-1] + 1))
    assert curve.losses.min() - 0.1 < within.min() and within.max() < curve.losses.max() + 0.1
    assert trend.end == within[-1]


@pytest.mark.parametrize("count", [10, 20, 600])
def test_a_teacher_that_does_not_train_any_more_ends_where_it_stopped(count):
    """Whatever was planned, of it or of another teacher in the cache."""
    found = sums(np.arange(count))
    stopped, training = (at(levels(found, trains=each), [count - 1]) for each in (False, True))
    assert stopped.end_B == pytest.approx(stopped.level_B, abs=0.02) and training.end_B < stopped.end_B - 0.1


def test_a_frozen_teachers_level_is_that_of_its_own_curve_not_of_the_text_that_it_labelled():
    """A backfill of a few easy samples moves neither the reference nor their level; of a stranger there is no more."""
    steps = np.arange(LENGTH)
    easy = np.array([LENGTH])
    for identity, is_own in (("teacher@4000", True), ("other@4000", False), ("teacher@9000", False)):
        frozen = (identity, "backfill")
        both = LossSums.total([sums(steps), sums(easy, teacher=frozen, offset=-1.0)])
        found = levels(both).of(0, 0, [T, frozen], np.array([0, 1]), np.array([2000, LENGTH]))
        end = at(levels(sums(steps)), [LENGTH]).end_B
        want = end if is_own else end - 1.0
        assert found.end_B == pytest.approx([*want, *want], abs=0.02) and found.level_B[1] == found.end_B[1]


def test_a_teacher_that_is_published_later_gets_a_level():
    """A student that follows, and a backfill beside it."""
    late = ("late", "backfill")
    cache = reader(sums(np.arange(100)), view={"streams": {"a": 1}})
    these = TeacherLevels([cache], [100], [1.0])
    assert np.isnan(at(these, [100], teacher=late).level_B)
    cache.losses = LossSums.total([cache.losses, sums(np.array([100]), teacher=late)])
    cache.view = {"streams": {"a": 1, "b": 1}}
    assert not np.isnan(at(these, [100], teacher=late).level_B)
