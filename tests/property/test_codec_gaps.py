"""The number coder and whole records, for whatever sets of ids there are."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from distill.cache import Atoms, golomb, record

FAST = settings(max_examples=150, deadline=None)
WIDEST = np.arange(2**24, dtype=np.int32)
"""Ranks of the largest vocabulary: every id its own."""


def reference_bits(value, order):
    """Unary and low part as strings, by counting the buckets that are passed."""
    zeros, width = 0, 1 << order
    while value >= width:
        value, width, zeros = value - width, 2 * width, zeros + 1
    bits = width.bit_length() - 1
    return "0" * zeros + "1", f"{value:0{bits}b}" if bits else ""


runs = st.lists(
    st.lists(st.one_of(st.integers(0, 40), st.integers(0, 2**24 - 1)), max_size=12), min_size=2, max_size=12
)


@FAST
@given(runs.filter(lambda r: len(r) % 2 == 0), st.data())
def test_coder(columns, data):
    """Samples of two runs; each starts at a whole byte, and reads back beside any others."""
    orders = [data.draw(st.integers(0, 23)) if run else golomb.ALL_ZERO for run in columns]
    sizes = np.array([len(run) for run in columns])
    samples = len(columns) // 2
    values = np.array([v for run in columns for v in run], np.int64)
    unary, unary_ends, low, low_ends = golomb.encode(values, sizes, np.array(orders), samples)

    for stream, ends, part in ((unary, unary_ends, 0), (low, low_ends, 1)):
        pieces = np.split(stream, ends[:-1])
        for n, piece in enumerate(pieces):
            want = "".join(reference_bits(v, orders[i])[part] for i in (2 * n, 2 * n + 1) for v in columns[i])
            got = "".join(f"{byte:08b}" for byte in piece)
            assert got == want + "0" * (-len(want) % 8)

    picked = data.draw(st.lists(st.integers(0, samples - 1), min_size=1, max_size=4))
    parts = [(np.split(unary, unary_ends[:-1])[n], np.split(low, low_ends[:-1])[n]) for n in picked]
    decoder = golomb.Decoder(
        np.concatenate([u for u, _ in parts]),
        np.array([len(u) for u, _ in parts]),
        np.concatenate([w for _, w in parts]),
        np.array([len(w) for _, w in parts]),
    )
    for column in (0, 1):
        which = [2 * n + column for n in picked]
        got = decoder.read(sizes[which][:, None], np.array(orders)[which][:, None])
        assert got.tolist() == [v for i in which for v in columns[i]]
    assert not decoder.left.any()


@FAST
@given(st.lists(hnp.arrays(np.int64, st.integers(0, 30), elements=st.integers(0, 2**24 - 1)), min_size=1, max_size=8))
def test_chosen_order_is_close_to_the_best(columns):
    sizes = np.array([len(run) for run in columns])
    chosen = golomb.choose_orders(np.concatenate(columns), sizes)

    def cost(run, order):
        return sum(len("".join(reference_bits(v, order))) for v in run.tolist())

    for run, order in zip(columns, chosen.tolist()):
        assert (order == golomb.ALL_ZERO) == (not run.any())
        if run.any():
            assert cost(run, order) <= min(cost(run, k) for k in range(24)) + 2 * len(run) + 2


S = 4


@st.composite
def tokens(draw):
    """Samples of S tokens: for each its heads with codes, its tails, and whether it has a target."""
    vocab = draw(st.sampled_from([2, 5, 300, 202_048, 2**24]))
    ids = st.sets(st.integers(0, vocab - 1), max_size=min(vocab, 20))
    count = S * draw(st.integers(1, 4))
    rows = draw(st.lists(st.tuples(ids, ids, st.booleans()), min_size=count, max_size=count))
    return vocab, rows, draw(st.permutations(range(count // S))), draw(st.randoms(use_true_random=False))


def to_atoms(rows, random, with_rest):
    heads = [random.sample(sorted(h), len(h)) for h, _, _ in rows]
    tails = [random.sample(sorted(t), len(t)) for _, t, _ in rows]
    flat = [i for row in heads for i in row]
    return (
        heads,
        tails,
        Atoms(
            torch.tensor([len(h) for h in heads], dtype=torch.int32),
            torch.tensor([len(t) for t in tails], dtype=torch.int32),
            torch.tensor(flat, dtype=torch.int32),
            torch.tensor([random.randrange(256) for _ in flat], dtype=torch.uint8),
            torch.tensor([i for row in tails for i in row], dtype=torch.int32),
            torch.tensor([random.randrange(256) for _ in rows if with_rest], dtype=torch.uint8),
        ),
    )


@FAST
@given(tokens(), st.booleans())
def test_records_return_their_sets(case, with_rest):
    vocab, rows, order, random = case
    heads, tails, atoms = to_atoms(rows, random, with_rest)
    valid = np.array([v for _, _, v in rows])
    ranks = WIDEST[:vocab] if vocab > 300 else np.random.default_rng(0).permutation(vocab).astype(np.int32)
    columns = record.encode(
        atoms, np.zeros(len(rows)), np.zeros(len(rows)), valid, S, np.argsort(ranks) if vocab <= 300 else ranks
    )
    ends = columns["ends"].astype(np.int64)
    starts = np.concatenate([np.zeros((1, 3), np.int64), ends[:-1]])
    # The samples are read in another order than they were written.
    picked = {name: columns[name][list(order)] for name in ("orders", "label", "entropy")}
    picked["rest"] = columns["rest"][list(order)] if with_rest else columns["rest"]
    for i, name in enumerate(("unary", "low", "codes")):
        picked[name] = np.concatenate([columns[name][starts[n, i] : ends[n, i]] for n in order])
    got, _, _, got_valid = record.decode(picked, (ends - starts)[list(order)], ranks)

    codes = dict(zip([(t, i) for t, h in enumerate(heads) for i in h], atoms.codes_N.tolist()))
    got_heads = torch.split(got.head_ids_N, got.heads_T.tolist())
    got_codes = torch.split(got.codes_N, got.heads_T.tolist())
    got_tails = torch.split(got.tail_ids_M, got.tails_T.tolist())
    for place, t in enumerate(t for n in order for t in range(n * S, n * S + S)):
        assert got_valid[place] == valid[t]
        want_heads, want_tails = (heads[t], tails[t]) if valid[t] else ([], [])
        assert dict(zip(got_heads[place].tolist(), got_codes[place].tolist())) == {i: codes[t, i] for i in want_heads}
        assert len(got_heads[place]) == len(want_heads)
        assert sorted(got_tails[place].tolist()) == sorted(want_tails)
        if with_rest:
            assert got.rest_T[place] == (atoms.rest_T[t] if valid[t] else 0)


@FAST
@given(st.floats(0, 32), st.sampled_from([(32.0, 254), (np.log(202_048), 255)]))
def test_statistics_in_a_byte(value, scale):
    top, levels = scale
    value = min(value, top)
    code = record.encode_stat(np.array([value]), top, levels)
    assert code <= levels
    assert abs(record.decode_stat(code, top, levels)[0] - value) <= np.sqrt(top * value) / levels + 2e-4


def test_an_id_twice_in_a_token_is_a_bug():
    _, _, atoms = to_atoms([({1}, set(), True)] * S, __import__("random"), False)
    twice = atoms._replace(
        heads_T=atoms.heads_T * 2, head_ids_N=atoms.head_ids_N.repeat(2), codes_N=atoms.codes_N.repeat(2)
    )
    with pytest.raises(AssertionError, match="twice"):
        record.encode(twice, np.zeros(S), np.zeros(S), np.ones(S, bool), S, np.arange(5))
