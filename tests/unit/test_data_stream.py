"""The stream is a pure function of position: complete, exact in its mixture, and the same however it is asked."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.config.errors import CacheError, ConfigError
from distill.config.schema import ReplayOrder
from distill.data.stream import PATTERN, Replay, Stream


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 100, 1000, 4097])
def test_every_sample_once_in_each_epoch(size):
    _, ids = Stream({"a": size}, {"a": 1.0}, seed=7).at(np.arange(3 * size))
    epochs = [ids[e * size : (e + 1) * size] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(size))
    if size >= 100:
        assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])


@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.01, 10), min_size=4, max_size=4),
    seed=st.integers(-(2**70), 2**70),
    start=st.integers(0, 10**12),
)
@settings(max_examples=40)
def test_any_chunking_of_positions_gives_the_same(sizes, weights, seed, start):
    names = "abcd"[: len(sizes)]
    make = lambda: Stream(dict(zip(names, sizes)), dict(zip(names, weights)), seed)  # noqa: E731
    positions = start + np.arange(64)
    corpus, ids = make().at(positions)
    assert (ids >= 0).all() and (ids < np.array(sizes)[corpus]).all()
    shuffled = np.random.default_rng(0).permutation(64)
    again = make()
    for part in np.array_split(shuffled, 7):
        other_corpus, other_ids = again.at(positions[part])
        assert np.array_equal(other_corpus, corpus[part]) and np.array_equal(other_ids, ids[part])
    square = make().at(positions.reshape(8, 8))
    assert np.array_equal(square[1], ids.reshape(8, 8))


def test_quotas_are_exact_and_evenly_spread():
    stream = Stream({"a": 50, "b": 7, "c": 1000}, {"a": 5.0, "b": 2.0, "c": 1.0}, seed=0)
    corpus, _ = stream.at(np.arange(3 * PATTERN))
    assert Counter(corpus.tolist()) == {0: 3 * PATTERN * 5 // 8, 1: 3 * PATTERN // 4, 2: 3 * PATTERN // 8}
    # In any window of n positions a corpus has its share of n, give or take a few.
    for c, share in enumerate((5 / 8, 2 / 8, 1 / 8)):
        drift = np.cumsum(corpus == c) - share * np.arange(1, len(corpus) + 1)
        assert np.ptp(drift) < 3


def test_a_mixture_meets_every_sample_once_in_each_epoch_of_its_corpus():
    sizes = {"a": 50, "b": 7, "c": 333}
    corpus, ids = Stream(sizes, {"a": 3.0, "b": 1.0, "c": 1.7}, seed=3).at(np.arange(2 * PATTERN + 123))
    for c, size in enumerate(sizes.values()):
        mine = ids[corpus == c]
        whole = len(mine) // size
        for epoch in mine[: whole * size].reshape(whole, size)[:40]:
            assert sorted(epoch) == list(range(size))


def test_a_corpus_is_met_in_the_same_order_whatever_it_is_mixed_with():
    alone = Stream({"b": 99}, {"b": 1.0}, seed=5).at(np.arange(300))[1]
    corpus, ids = Stream({"a": 10, "b": 99}, {"a": 1.0, "b": 1.0}, seed=5).at(np.arange(700))
    assert np.array_equal(ids[corpus == 1][:300], alone)


def test_seeds_and_corpora_are_permuted_independently():
    n, positions = 2000, np.arange(2000)
    orders = [Stream({name: n}, {name: 1.0}, seed).at(positions)[1] for name in "ab" for seed in (0, 1, 2, 2**40)]
    orders.append(positions)
    orders.append(Stream({"a": n}, {"a": 1.0}, 0).at(positions + n)[1])
    correlation = np.corrcoef(np.array(orders)) - np.eye(len(orders))
    assert np.abs(correlation).max() < 0.1
    # Neighbors in a permutation are unrelated, too.
    assert abs(np.corrcoef(orders[0][:-1], orders[0][1:])[0, 1]) < 0.1


def test_small_permutations_all_occur_about_equally():
    _, ids = Stream({"a": 4}, {"a": 1.0}, seed=0).at(np.arange(4 * 12000))
    counts = Counter(map(tuple, ids.reshape(-1, 4).tolist()))
    assert len(counts) == 24
    assert sum((c - 500) ** 2 / 500 for c in counts.values()) < 50  # chi-squared, 23 degrees: 49.7 is p = 0.001


def test_the_order_is_the_recorded_one():
    # Caches record a stream by its description: if this changes, so must FORMAT.
    corpus, ids = Stream({"main": 1000, "code": 77}, {"main": 3.0, "code": 1.0}, seed=42).at(np.arange(12) * 1009)
    assert corpus.tolist() == [0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0]
    assert ids.tolist() == [307, 97, 6, 192, 225, 970, 51, 931, 39, 503, 33, 419]


def test_a_description_survives_json_in_any_order_of_keys():
    stream = Stream({"z": 10, "a": 99}, {"z": 0.3, "a": 0.7}, seed=9)
    text = json.dumps({**stream.describe(), "planned": 5}, sort_keys=True)
    again = Stream.from_description(json.loads(text))
    assert again.names == ["z", "a"]
    for ours, theirs in zip(stream.at(np.arange(999)), again.at(np.arange(999))):
        assert np.array_equal(ours, theirs)
    with pytest.raises(CacheError, match="order is 99"):
        Stream.from_description({**stream.describe(), "order": 99})
    with pytest.raises(CacheError, match="not readable"):
        Stream.from_description({"order": 1, "seed": 3})


def test_weights_that_cannot_be_met():
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"data\.corpora\.b\.weight is .*positive"):
            Stream({"a": 1, "b": 1}, {"a": 1.0, "b": weight}, 0)
    with pytest.raises(ConfigError, match=r"data\.corpora\.b\.weight is 1e-06 of 1\.0.*at least 1/16384"):
        Stream({"a": 1, "b": 1}, {"a": 1.0, "b": 1e-6}, 0)


@pytest.mark.parametrize(
    ("order", "planned", "expected"),
    [
        (ReplayOrder.same, 4, [0, 1, 2, 3, 0, 1]),
        (ReplayOrder.newest, 4, [3, 2, 1, 0, 3, 2]),
        (ReplayOrder.late_first, 4, [2, 3, 0, 1, 2, 3]),
        (ReplayOrder.late_first, 5, [2, 3, 4, 0, 1, 2]),
        (ReplayOrder.late_first, 1, [0, 0, 0, 0, 0, 0]),
        (ReplayOrder.own, 4, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_replay_by_hand(order, planned, expected):
    replay = Replay(order, planned)
    assert replay(np.arange(6)).tolist() == expected
    if order in (ReplayOrder.same, ReplayOrder.late_first):  # those that follow a teacher in training
        assert [replay.furthest(p) for p in range(6)] == np.maximum.accumulate(expected).tolist()
