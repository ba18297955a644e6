"""The plan of a backfill against a loop that looks at one sample at a time."""

import math

import numpy as np
import pytest

from distill.run.backfill_plan import Held, make_plan, worth

V = 64


def held(losses, mine=()):
    """None: a gap."""
    loss_N = np.array([math.nan if x is None else x for x in losses])
    mine_N = np.zeros(len(losses), bool)
    mine_N[list(mine)] = True
    return Held(np.array([x is not None for x in losses]), loss_N, mine_N)


def plan_of(parts, costs=None, **more):
    settings = {"vocab_size": V, "flops_per_sample": costs or [1.0] * len(parts), "min_lag": None, "unit_samples": 2}
    return make_plan(parts, **settings | more)


def flat(plan):
    return [(unit.corpus, int(i)) for unit in plan.units for i in unit.sample_ids]


def test_gaps_alone_without_min_lag_and_each_once():
    plan = plan_of([held([2.0, None, 3.0, None, None])])
    assert [u.sample_ids.tolist() for u in plan.units] == [[1, 3], [4]]
    assert (plan.gaps_C, plan.gaps, plan.left_out, plan.samples) == ([3], 3, 0, 3)
    assert plan_of([held([2.0, 2.5])]).units == []


def test_stale_records_follow_gaps_by_their_lag():
    plan = plan_of([held([3.5, 2.0, None, 2.9, 3.0, 2.05])], min_lag=0.5, unit_samples=1)
    assert flat(plan) == [(0, 2), (0, 0), (0, 4), (0, 3)]
    assert plan.gaps == 1
    assert [u.worth for u in plan.units] == pytest.approx([math.log(V) - 2.0, 1.5, 1.0, 0.9])


def test_a_gap_is_worth_as_much_as_a_record_worse_than_knowing_nothing():
    assert worth(held([9.0, 2.0, None]), V, None).tolist() == pytest.approx([0.0, 0.0, 7.0])
    assert worth(held([None, None]), V, 0.1).tolist() == pytest.approx([math.log(V)] * 2)
    # Records without a loss (no token has a label) are never stale.
    assert worth(held([math.nan, 2.0, 2.2]), V, 0.1).tolist() == pytest.approx([0.0, 0.0, 0.2])


def test_a_teacher_replaces_only_what_is_worse_than_its_own():
    part = held([3.5, 2.0, 2.9, None])
    assert worth(part._replace(teacher_loss=2.4), V, 0.5).tolist() == pytest.approx([1.1, 0, 0.5, math.log(V) - 2.4])
    assert worth(part._replace(teacher_loss=3.0), V, 0.5)[[0, 2]].tolist() == pytest.approx([0.5, 0.0])
    # One that knows nothing fills gaps alone.
    ignorant = worth(part._replace(teacher_loss=math.log(V) + 1), V, 0.5)
    assert ignorant[:3].tolist() == [0, 0, 0] and ignorant[3] > 0


def test_what_the_teacher_made_itself_is_never_stale():
    assert flat(plan_of([held([3.5, 2.0, 3.5], mine=[0])], min_lag=0.1)) == [(0, 2)]


def test_worth_per_flop_orders_corpora():
    cheap, dear = held([None] * 3), held([2.0, None])
    # The gap of a cache with a good teacher is worth less; where it costs less it comes first nevertheless.
    assert flat(plan_of([cheap, dear]))[0] == (0, 0)
    assert flat(plan_of([cheap, dear], costs=[10.0, 1.0]))[0] == (1, 1)


def test_budgets_cut_the_plan_and_count_what_is_done():
    parts = [held([2.0, None, None, None, 2.1], mine=[0]), held([None] * 4)]
    assert plan_of(parts, max_samples=4).samples == 3
    assert plan_of(parts, max_samples=4).left_out == 4
    assert plan_of(parts, max_samples=1).samples == 0
    assert plan_of(parts, costs=[2.0, 4.0], max_flops=9.0).samples == 3
    assert plan_of(parts, costs=[2.0, 4.0], max_flops=13.0).samples == 4
    assert plan_of(parts, max_samples=100, max_flops=1e9).left_out == 0


@pytest.mark.parametrize("seed", range(5))
def test_a_budget_spreads_and_a_killed_run_ends_with_what_a_whole_one_does(seed):
    rng = np.random.default_rng(seed)
    settings = {"max_samples": 40, "unit_samples": 8, "min_lag": 0.2}
    losses = [2.0 if i % 10 == 0 else 3.0 if i % 10 == 1 else None for i in range(200)]
    whole = {i for _, i in flat(plan_of([held(losses)], **settings))}
    assert len(whole) == 40 and 60 < np.mean(list(whole)) < 140  # the first 40 gaps have a mean of 25
    done = [i for i in whole if rng.random() < 0.5]
    for i in done:
        losses[i] = 2.5
    rest = {i for _, i in flat(plan_of([held(losses, done)], **settings))}
    assert not rest & set(done) and rest | set(done) == whole


@pytest.mark.parametrize("seed", range(5))
def test_any_cache_against_one_sample_at_a_time(seed):
    rng = np.random.default_rng(seed)
    losses = [None if rng.random() < 0.4 else float(rng.uniform(1.5, 5.0)) for _ in range(50)]
    mine = [i for i, x in enumerate(losses) if x is not None and rng.random() < 0.2]
    plan = plan_of([held(losses, mine)], min_lag=0.7, unit_samples=7)
    best = min(x for x in losses if x is not None)
    gap = max(math.log(V) - best, max(x - best for x in losses if x is not None))
    expected = {}
    for i, loss in enumerate(losses):
        if loss is None:
            expected[i] = gap
        elif i not in mine and loss - best >= 0.7:
            expected[i] = loss - best
    got = [i for _, i in flat(plan)]
    assert sorted(got) == sorted(expected)
    # Units come in order of worth: none of a unit is worth more than the least of the one before.
    for before, after in zip(plan.units, plan.units[1:]):
        assert min(expected[i] for i in before.sample_ids) >= max(expected[i] for i in after.sample_ids)
    shares = [plan.share(rank, 3) for rank in range(3)]
    assert sorted(id(u) for share in shares for u in share) == sorted(map(id, plan.units))
