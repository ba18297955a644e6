"""Records, for whatever atoms there are; and whatever bytes are taken for a record."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.cache import Atoms, CacheHeader, make_codec, record
from distill.cache.put_check import PutCheck
from distill.config.errors import CacheError
from distill.config.registry import CODECS
from distill.config.schema import CodecConfig
from tests import format_reader

FAST = settings(max_examples=100)
S = 4


@st.composite
def tokens(draw):
    """Samples of S tokens of any codec: for each token its {id: code} and whether it has a target."""
    vocab = draw(st.sampled_from([2, 5, 300, 202_048, 2**24]))
    config = CodecConfig(draw(st.sampled_from(CODECS.names)), draws=draw(st.sampled_from([1, 7, 300])), k=2)
    codec = make_codec(config, vocab)
    count = S * draw(st.integers(1, 4))
    rows = []
    for _ in range(count):
        ids = draw(st.sets(st.integers(0, vocab - 1), max_size=min(vocab, codec.max_atoms, 20)))
        if codec.total:
            cuts = sorted(draw(st.sets(st.integers(1, max(codec.total - 1, 1)), max_size=max(len(ids) - 1, 0))))
            cuts = [0, *(c for c in cuts if c < codec.total), codec.total]
            codes = [b - a for a, b in pairwise(cuts)]
            ids = list(ids)[: len(codes)]
            codes = [*codes[: len(ids) - 1], codec.total - sum(codes[: len(ids) - 1])] if ids else []
        else:
            codes = [draw(st.integers(0, codec.max_code)) for _ in ids]
        rows.append((dict(zip(ids, codes)), draw(st.booleans())))
    return vocab, config, rows, draw(st.permutations(range(count // S))), draw(st.randoms(use_true_random=False))


def to_atoms(rows, random, with_rest):
    shuffled = [random.sample(sorted(row.items()), len(row)) for row, _ in rows]
    flat = torch.tensor([pair for row in shuffled for pair in row], dtype=torch.int32).reshape(-1, 2)
    rest = [random.randrange(256) for _ in rows if with_rest]
    counts = torch.tensor([len(row) for row in shuffled], dtype=torch.int32)
    return Atoms(counts, flat[:, 0].contiguous(), flat[:, 1].contiguous(), torch.tensor(rest, dtype=torch.uint8))


def encoded(vocab, config, rows, random):
    """Atoms, what becomes of them, and the table of ranks."""
    codec = make_codec(config, vocab)
    atoms = to_atoms(rows, random, config.name == "topk")
    ids_by_rank = np.random.default_rng(0).permutation(vocab) if vocab <= 300 else np.arange(vocab)
    valid = np.array([v for _, v in rows])
    stat = np.array([random.random() for _ in rows])
    found = record.encode(atoms, -30 * stat, stat / 2, valid, S, np.argsort(ids_by_rank), codec)
    bounds = [0, *found.ends.tolist()]
    raws = [
        record.Raw(found.records[a:b].tobytes(), int(n)) for a, b, n in zip(bounds, bounds[1:], found.atoms.tolist())
    ]
    return codec, atoms, stat, raws, ids_by_rank


@FAST
@given(tokens())
def test_records_return_their_atoms(case):
    """Read in another order than they were written."""
    vocab, config, rows, order, random = case
    codec, atoms, stat, raws, ids_by_rank = encoded(vocab, config, rows, random)
    got = record.decode([raws[n] for n in order], S, ids_by_rank.astype(np.int32), codec)
    ids, codes = (torch.split(x, got.atoms.counts_T.tolist()) for x in (got.atoms.ids_N, got.atoms.codes_N))
    for place, t in enumerate(t for n in order for t in range(n * S, n * S + S)):
        row, valid = rows[t]
        assert got.valid_T[place] == valid
        want = row if valid else {}
        assert dict(zip(ids[place].tolist(), codes[place].tolist())) == want and len(ids[place]) == len(want)
        if valid:
            assert abs(got.label_logprob_T[place] + 30 * stat[t]) <= np.sqrt(32 * 30 * stat[t]) / 254 + 2e-4
            assert abs(got.entropy_T[place] - stat[t] / 2) <= np.sqrt(stat[t] / 2 * np.log(vocab)) / 255 + 1e-4
            assert not len(atoms.rest_T) or got.atoms.rest_T[place] == atoms.rest_T[t]


@settings(max_examples=25)
@given(tokens())
def test_the_slow_reader_of_the_page_agrees(case):
    vocab, config, rows, _, random = case
    _, atoms, _, raws, ids_by_rank = encoded(vocab, config, rows, random)
    drawn = config.name in ("systematic", "multinomial")
    parameters = {"name": config.name} | ({"draws": config.draws} if drawn else {})
    for n, raw in enumerate(raws):
        for t, token in enumerate(format_reader.record(raw.data, S, parameters, ids_by_rank), start=n * S):
            row, valid = rows[t]
            assert (token is not None) == valid
            if valid:
                assert dict(token[3]) == row and token[2] == (atoms.rest_T[t] if len(atoms.rest_T) else None)


@FAST
@given(tokens(), st.data())
def test_what_is_no_record_is_told_apart_or_is_one(case, data):
    """Any bytes: an error that names the sample, or atoms as the codec makes them; never a crash."""
    vocab, config, rows, _, random = case
    codec, _, _, raws, ids_by_rank = encoded(vocab, config, rows, random)
    place = data.draw(st.integers(0, len(raws) - 1))
    garbage = record.Raw(
        data.draw(st.binary(max_size=200)), data.draw(st.one_of(st.integers(0, 40), st.integers(0, 2**32 - 1)))
    )
    raws[place] = garbage
    try:
        got = record.decode(raws, S, ids_by_rank.astype(np.int32), codec)
    except ValueError as error:
        assert error.args == (place,)
    else:
        assert len(got.atoms.ids_N) == got.atoms.counts_T.sum() and (got.atoms.ids_N < vocab).all()
        assert (got.atoms.codes_N >= 0).all() and (got.atoms.codes_N <= codec.max_code).all()
        ids_TK, probs_TK = codec.decode(got.atoms)
        assert torch.isfinite(probs_TK).all() and ids_TK.max() < vocab


@FAST
@given(st.floats(0, 32), st.sampled_from([(32.0, 255), (np.log(202_048), 255)]))
def test_statistics_in_a_byte(value, scale):
    top, levels = scale
    value = min(value, top)
    code = record.encode_stat(np.array([value]), top, levels)
    assert code <= levels
    assert abs(record.decode_stat(code, top, levels)[0] - value) <= np.sqrt(top * value) / levels + 2e-4


@st.composite
def puts(draw):
    """What a codec could have made, with up to two numbers changed into any others."""
    vocab, config, rows, _, random = draw(tokens())
    codec = make_codec(config, vocab)
    atoms = to_atoms(
        [row if codec.total == 0 or row[0] else ({0: codec.total}, row[1]) for row in rows], random, codec.has_rest
    )
    columns = [column.tolist() for column in atoms]
    columns += [[random.choice([-1.5, 0.0, -31.0]) for _ in rows] for _ in range(2)]
    near = st.integers(-2, 7) | st.sampled_from([vocab - 1, vocab, 255, 256, 2**31, 2**32, -(2**63), 2**63 - 1])
    for _ in range(draw(st.integers(0, 2))):
        column = columns[draw(st.integers(0, 5))]
        if column:
            column[draw(st.integers(0, len(column) - 1))] = draw(near if isinstance(column[0], int) else st.floats())
    return config, vocab, columns[:4], [valid for _, valid in rows], columns[4:]


@settings(max_examples=400)
@given(puts())
def test_whatever_is_put_is_refused_or_can_be_read(case):
    """The same atoms, by the slow reader; compiled code has no checks of its own."""
    config, vocab, columns, valid, (label, entropy) = case
    codec, ids = make_codec(config, vocab), list(range(len(valid) // S))
    header = CacheHeader(vocab, "t", "c", S, 9, config, 0, folder="here")
    atoms = Atoms(*(np.array(column, np.int64) for column in columns))
    try:
        taken = PutCheck(header, codec).batch(ids, ids, atoms, label, entropy, valid, 0, 0, "t")
    except CacheError as error:
        assert str(error).startswith("cache here: ")
        return
    assert [column.dtype for column in taken.atoms] == [torch.int32] * 3 + [torch.uint8]
    found = record.encode(
        taken.atoms, taken.label_logprob_T, taken.entropy_T, taken.valid_T, S, np.arange(vocab), codec
    )
    starts = np.cumsum([0, *columns[0]]).tolist()
    parameters = {"name": config.name} | ({"draws": config.draws} if codec.total else {})
    for n, (a, b) in enumerate(pairwise([0, *found.ends.tolist()])):
        tokens = format_reader.record(found.records[a:b].tobytes(), S, parameters, range(vocab))
        for t, token in enumerate(tokens, start=n * S):
            assert (token is not None) == valid[t]
            if token is not None:
                rows = zip(columns[1][starts[t] : starts[t + 1]], columns[2][starts[t] : starts[t + 1]], strict=True)
                assert token[3] == sorted(rows) and all(code <= codec.max_code for _, code in token[3])
                assert not codec.total or sum(code for _, code in token[3]) == codec.total


def test_an_id_twice_in_a_token_is_a_bug():
    atoms = Atoms(*(torch.tensor(x, dtype=torch.int32) for x in ([2] * S, [1, 1] * S, [10, 10] * S, [])))
    with pytest.raises(AssertionError, match="twice"):
        record.encode(
            atoms, np.zeros(S), np.zeros(S), np.ones(S, bool), S, np.arange(5), make_codec(CodecConfig(draws=20), 5)
        )
