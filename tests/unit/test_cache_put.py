"""A put takes only targets: whatever else comes is refused by cache, sample and position, also under `python -O`."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open

from distill.cache import Atoms, CacheReader, CacheWriter
from distill.config.errors import CacheError
from distill.config.schema import CodecConfig
from tests.workers.cache_writers import SAMPLES, S, V, batch, digests, header, put

TOPK = CodecConfig("topk", k=4)
ROW = 5
"""The token of the second sample that is spoiled."""


def first_atom(made, t):
    return int(made.atoms.counts_T[:t].sum())


def change(made, column, place, value):
    """A batch with one number of its atoms changed."""
    columns = made.atoms._asdict()
    columns[column] = columns[column].clone().to(torch.int64)
    columns[column][place] = value
    return made._replace(atoms=Atoms(**columns))


def code(value, row=S + ROW):
    return lambda made: change(made, "codes_N", first_atom(made, row), value)


def token_id(value, row=S + ROW):
    return lambda made: change(made, "ids_N", first_atom(made, row), value)


def twice(made):
    at = first_atom(made, S + ROW)
    return change(made, "ids_N", at + 1, int(made.atoms.ids_N[at]))


def too_many(made, row=S + ROW, more=2):
    """More atoms in a token, two more than top-4 has."""
    at = first_atom(made, row)
    counts_T, ids_N, codes_N, rest_T = made.atoms
    counts_T = counts_T.clone()
    counts_T[row] += more
    ids_N, codes_N = (torch.cat([x[:at], torch.arange(more, dtype=x.dtype), x[at:]]) for x in (ids_N, codes_N))
    return made._replace(atoms=Atoms(counts_T, ids_N, codes_N, rest_T))


def number(name, value, row=S + ROW):
    def changed(made):
        column = getattr(made, name).clone()
        column[row] = value
        return made._replace(**{name: column})

    return changed


def atoms(**columns):
    return lambda made: made._replace(
        atoms=made.atoms._replace(**{k: f(getattr(made.atoms, k)) for k, f in columns.items()})
    )


NAMED = {
    "draws too few": (None, code(-3), "code is not from 1 to 20: -3"),
    "a draw of none": (None, code(0), "code is not from 1 to 20: 0"),
    "draws too many": (None, code(19), "codes do not sum to 20 draws, but to"),
    "code beyond": (TOPK, code(256), "code is not from 0 to 255: 256"),
    "negative code": (TOPK, code(-1), "code is not from 0 to 255: -1"),
    "negative id": (None, token_id(-1), "id is not from 0 to 63: -1"),
    "id beyond": (None, token_id(V), "id is not from 0 to 63: 64"),
    "id beyond 32 bits": (None, token_id(2**32 + 1), "id is not from 0 to 63: 4294967297"),
    "twice in order": (None, twice, "an id comes twice"),
    "twice in any order": (TOPK, twice, "an id comes twice"),
    "too many atoms": (TOPK, too_many, "more atoms than the codec makes, 4: 6"),
    "negative count": (None, lambda m: change(m, "counts_T", S + ROW, -1), "counts_T is not from 0 to"),
    "huge count": (None, lambda m: change(m, "counts_T", S + ROW, 2**62), "counts_T is not from 0 to"),
    "nan": (None, number("label_logprob", torch.nan), "label_logprob_T is not finite: nan"),
    "inf": (None, number("label_logprob", -torch.inf), "label_logprob_T is not finite: -inf"),
    "entropy": (None, number("entropy", torch.nan), "entropy_T is not finite"),
    "likely": (None, number("label_logprob", 0.5), "label_logprob_T is above 0 nats: 0.5"),
    "sure": (None, number("entropy", -1.0), "entropy_T is not from 0 to 4.159 nats: -1.0"),
    "too unsure": (None, number("entropy", 4.2), "entropy_T is not from 0 to 4.159 nats: 4.1"),
    "absurd": (None, number("entropy", 1e30), "entropy_T is not from 0 to 4.159 nats: 1.0"),
    "no atoms": (
        None,
        lambda m: m._replace(atoms=Atoms(torch.zeros(2 * S), *[torch.empty(0)] * 3)._replace(
            counts_T=torch.zeros(2 * S, dtype=torch.int32))),
        r"sample 3, position 0: codes do not sum to 20 draws, but to: 0",
    ),
    "rest": (TOPK, atoms(rest_T=lambda r: r.int() + 256), r"sample 3, position 0: rest_T is not from 0 to 255"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_what_is_no_target_is_refused_by_sample_and_position(tmp_path, name):
    codec, spoil, problem = NAMED[name]
    place = "" if problem.startswith("sample") else rf"sample 8, position {ROW}: "
    with CacheWriter(tmp_path, header(codec), writer="w") as writer:
        with pytest.raises(CacheError, match=f"cache {tmp_path}: {place}{problem}"):
            writer.put(*spoil(batch([3, 8], codec)), step=0, tokens_seen=0, teacher="t")
        assert put(writer, [3], codec)
    assert CacheReader(tmp_path).covers(np.arange(SAMPLES)).tolist() == [i == 3 for i in range(SAMPLES)]


SHAPES = {
    "label_logprob": lambda m: m._replace(label_logprob=m.label_logprob[1:]),
    "entropy": lambda m: m._replace(entropy=m.entropy.reshape(2, S)),
    "valid": lambda m: m._replace(valid=m.valid[:S]),
    "digests": lambda m: m._replace(digests=m.digests[:1]),
    "counts": atoms(counts_T=lambda x: x[1:]),
    "codes": atoms(codes_N=lambda x: x[1:]),
    "atoms": atoms(codes_N=lambda x: x[1:], ids_N=lambda x: x[1:]),
    "rest": atoms(rest_T=lambda x: torch.zeros(2 * S, dtype=torch.uint8)),
    "float ids": atoms(ids_N=lambda x: x.float()),
    "float codes": atoms(codes_N=lambda x: x.numpy() / 1),
    "float digests": lambda m: m._replace(digests=m.digests.astype(np.float64)),
    "text digests": lambda m: m._replace(digests=["12", "13"]),
    "negative digests": lambda m: m._replace(digests=-np.arange(1, 3)),
    "large digests": lambda m: m._replace(digests=[1, 2**64]),
    "mask of labels": lambda m: m._replace(valid=torch.where(m.valid, 7, -100)),
    "float samples": lambda m: m._replace(ids=np.array([3.0, 8.0])),
    "sample beyond": lambda m: m._replace(ids=np.array([3, SAMPLES])),
    "negative sample": lambda m: m._replace(ids=np.array([-1, 8])),
    "huge sample": lambda m: m._replace(ids=[3, 2**63]),
    "one sample, two tokens": lambda m: m._replace(ids=np.array([8, 8])),
    "complex labels": lambda m: m._replace(label_logprob=m.label_logprob.to(torch.complex64)),
    "complex entropy": lambda m: m._replace(entropy=m.entropy.numpy().astype(np.complex64)),
    "complex mask": lambda m: m._replace(valid=m.valid.to(torch.complex64)),
    "complex samples": lambda m: m._replace(ids=torch.tensor([3, 8]) * 1j),
    "numbers in text": lambda m: m._replace(entropy=["1.0"] * 2 * S),
    "halves of samples": lambda m: m._replace(ids=[1.7, 2.3]),
    "samples in columns": lambda m: m._replace(ids=np.array([[3], [8]])),
    "text entropy": lambda m: m._replace(entropy=["x"] * 2 * S),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_and_kinds_that_do_not_fit_are_refused(tmp_path, name):
    with CacheWriter(tmp_path, header(), writer="w") as writer, pytest.raises(CacheError, match=f"cache {tmp_path}: "):
        writer.put(*SHAPES[name](batch([3, 8])), step=0, tokens_seen=0, teacher="t")
    assert not CacheReader(tmp_path).covers(np.arange(SAMPLES)).any()


@pytest.mark.parametrize(
    "facts, problem",
    [
        (dict(step=-1), "step is -1; allowed are whole numbers from 0 to 4294967295"),
        (dict(step=2**32), "step is 4294967296"),
        (dict(step=1.0), r"step is 1\.0"),
        (dict(tokens_seen=-5), "tokens_seen is -5"),
        (dict(tokens_seen=2**63), "tokens_seen is 9223372036854775808"),
        (dict(teacher="a\nb"), r"teacher is 'a\\nb'"),
        (dict(teacher=None), "teacher is None"),
        (dict(teacher="x" * 1001), "allowed are up to 1000"),
    ],
)
def test_steps_and_teachers_that_cannot_be_are_refused(tmp_path, facts, problem):
    with CacheWriter(tmp_path, header(), writer="w") as writer:
        with pytest.raises(CacheError, match=problem):
            writer.put(*batch([1]), **dict(step=0, tokens_seen=0, teacher="t") | facts)
        writer.put(*batch([1]), step=np.int64(2**32 - 1), tokens_seen=2**63 - 1, teacher="t" * 1000)
    assert CacheReader(tmp_path).steps(np.array([1])).tolist() == [2**32 - 1]


def stored(folder):
    """Bytes of all records of a cache with one shard, behind the mark of its beginning."""
    _, path = sorted(folder.glob("shards/w/*/*"))
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name).tobytes() for name in ("records", "atoms", "checks")}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("codec", [None, TOPK], ids=str)
def test_what_comes_for_tokens_without_a_target_is_not_stored(tmp_path, codec):
    """Whatever it is: the bytes are those of a put without it."""
    made = batch([3, 8], codec)
    row = 2 * S - 1
    assert not made.valid[row]
    spoiled = made
    for spoil in (
        code(10**6, row), token_id(2**40, row), number("label_logprob", torch.nan, row),
        number("entropy", torch.inf, row), lambda m: change(m, "ids_N", -1, -7),
        lambda m: too_many(m, row, 40),
    ):  # fmt: skip
        spoiled = spoil(spoiled)
    clean = made._replace(atoms=made.atoms.select(made.valid)._replace(counts_T=made.atoms.counts_T * made.valid))
    clean = clean._replace(atoms=clean.atoms._replace(rest_T=made.atoms.rest_T))
    for name, each in (("a", spoiled), ("b", clean), ("c", made)):
        with CacheWriter(tmp_path / name, header(codec), writer="w") as writer:
            writer.put(*each, step=0, tokens_seen=0, teacher="t")
    a, b, c = (stored(tmp_path / name) for name in "abc")
    assert a == b == c


PROGRAM = """
import sys, numpy as np, torch
from distill.cache import CacheWriter
from distill.config.errors import CacheError
from tests.unit.test_cache_put import NAMED, SHAPES
from tests.workers.cache_writers import batch, header
assert False, "assertions are off"
named = [(codec, spoil) for codec, spoil, _ in NAMED.values()] + [(None, spoil) for spoil in SHAPES.values()]
for number, (codec, spoil) in enumerate(named):
    with CacheWriter(f"{sys.argv[1]}/{number}", header(codec), writer="w") as writer:
        try:
            writer.put(*spoil(batch([3, 8], codec)), step=0, tokens_seen=0, teacher="t")
        except CacheError:
            continue
        sys.exit(f"taken: {number}")
print(len(named))
"""


def test_the_same_holds_without_assertions(tmp_path):
    done = subprocess.run([sys.executable, "-O", "-c", PROGRAM, tmp_path], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.strip()) == (0, str(len(NAMED) + len(SHAPES))), done.stderr + done.stdout


# ---------------------------------------------------------------- what is passed over


def test_a_put_that_is_passed_over_is_counted(tmp_path):
    with CacheWriter(tmp_path, header(), writer="w") as writer:
        put(writer, [1, 2, 3], step=5)
        assert writer.stats.passed == 0
    with CacheWriter(tmp_path, header(), writer="v") as writer:
        assert put(writer, [2, 3, 4], step=5) and put(writer, [1], step=4) and put(writer, [1], step=6)
        writer.flush()
        assert (writer.stats.passed, writer.stats.samples) == (3, 2)
        with pytest.raises(
            CacheError, match=r"sample 3 has targets of step 5 by teacher t, and these are of teacher u"
        ):
            put(writer, [9, 3], step=5, teacher="u")
    assert CacheReader(tmp_path).steps(np.array([1, 2, 3, 4, 9])).tolist() == [6, 5, 5, 5, -1]


def test_of_a_sample_that_comes_twice_in_a_put_the_last_counts(tmp_path):
    one, other = batch([4], step=0), batch([4], step=1)
    both = batch([4, 4])
    both = both._replace(
        atoms=Atoms.cat([one.atoms, other.atoms]),
        label_logprob=torch.cat([one.label_logprob, other.label_logprob]),
        entropy=torch.cat([one.entropy, other.entropy]),
    )
    with CacheWriter(tmp_path / "a", header(), writer="w") as writer:
        writer.put(*both, step=0, tokens_seen=0, teacher="t")
        writer.flush()
        assert (writer.stats.samples, writer.stats.passed) == (1, 1)
    with CacheWriter(tmp_path / "b", header(), writer="w") as writer:
        writer.put(*other, step=0, tokens_seen=0, teacher="t")
    assert stored(tmp_path / "a") == stored(tmp_path / "b")


def test_the_original_may_change_after_a_put(tmp_path):
    made = batch([3])
    with CacheWriter(tmp_path / "a", header(), writer="w") as writer:
        writer.put(*made, step=0, tokens_seen=0, teacher="t")
        for column in (*made.atoms, made.label_logprob, made.entropy, made.valid):
            column.zero_()
    with CacheWriter(tmp_path / "b", header(), writer="w") as writer:
        writer.put(*batch([3]), step=0, tokens_seen=0, teacher="t")
    assert stored(tmp_path / "a") == stored(tmp_path / "b")


def test_what_a_checkpoint_kept_is_checked_too(tmp_path):
    with CacheWriter(tmp_path / "a", header(), writer="w") as writer:
        put(writer, [3, 8])
        (kept,) = writer.hand_over()
    with CacheWriter(tmp_path / "b", header(), writer="w") as writer:
        wrong = kept.atoms.ids_N.clone()
        wrong[0] = V
        with pytest.raises(CacheError, match="sample 3, position 0: id is not from 0 to 63: 64"):
            writer.take_back([kept._replace(atoms=kept.atoms._replace(ids_N=wrong))])
        writer.take_back([kept])
    assert CacheReader(tmp_path / "b").covers([3, 8]).all()


# ---------------------------------------------------------------- logits


def logits(samples):
    return torch.randn(samples * S, V, generator=torch.Generator().manual_seed(0))


def test_labels_where_no_loss_counts_may_be_anything(tmp_path):
    rows_TV, valid = logits(2), torch.arange(2 * S) % 3 != 0
    labels = torch.where(valid, torch.arange(2 * S), -100)
    for name, given in (("a", labels), ("b", torch.where(valid, labels, 7)), ("c", labels.tolist())):
        with CacheWriter(tmp_path / name, header(), writer="w") as writer:
            writer.put_logits([3, 8], digests([3, 8]), rows_TV, given, valid, step=0, tokens_seen=0, teacher="t")
    assert stored(tmp_path / "a") == stored(tmp_path / "b") == stored(tmp_path / "c")
    targets = CacheReader(tmp_path / "a").read([3, 8], digests([3, 8])).targets
    want = rows_TV.double().log_softmax(-1)[torch.arange(2 * S), torch.arange(2 * S)]
    assert torch.equal(targets.covered_T, valid)
    assert (targets.label_logprob_T - want)[valid].abs().max() < 0.1


@pytest.mark.parametrize("bad", [-1, -100, V])
def test_a_label_that_counts_must_be_an_id(tmp_path, bad):
    labels = torch.zeros(2 * S, dtype=torch.int64)
    labels[S + ROW] = bad
    with (
        CacheWriter(tmp_path, header(), writer="w") as writer,
        pytest.raises(CacheError, match=f"sample 8, position {ROW}: label is not from 0 to 63: {bad}"),
    ):
        writer.put_logits(
            [3, 8], digests([3, 8]), logits(2), labels, labels == labels, step=0, tokens_seen=0, teacher="t"
        )


def test_logits_that_do_not_fit_are_refused(tmp_path):
    labels, all_T = torch.zeros(S, dtype=torch.int64), torch.ones(S, dtype=torch.bool)
    with CacheWriter(tmp_path, header(), writer="w") as writer:
        for rows_TV, given in (
            (logits(2), labels),
            (logits(1)[:, 1:], labels),
            (logits(1)[None], labels),
            (logits(1), labels[1:]),
        ):
            with pytest.raises(CacheError, match=r"1 samples of 16 tokens need \[16, 64\], \[16\], \[16\]"):
                writer.put_logits([3], digests([3]), rows_TV, given, all_T, step=0, tokens_seen=0, teacher="t")
        broken = logits(1)
        broken[ROW, 3] = torch.nan
        with pytest.raises(CacheError, match=f"sample 3, position {ROW}: label_logprob_T is not finite: nan"):
            writer.put_logits([3], digests([3]), broken, labels, all_T, step=0, tokens_seen=0, teacher="t")


@pytest.mark.parametrize("one", [3, np.int64(3), np.array(3), torch.tensor(3), [3], (3,), np.array([3])], ids=repr)
def test_one_sample_without_a_batch_dimension(tmp_path, one):
    rows_SV, labels, all_S = logits(1), torch.arange(S), torch.ones(S, dtype=torch.bool)
    digest = digests([3])
    for name, ids, of in (("a", one, digest[0]), ("b", np.array([3]), digest), ("c", one, int(digest[0]))):
        with CacheWriter(tmp_path / name, header(), writer="w") as writer:
            writer.put_logits(ids, of, rows_SV, labels, all_S, step=0, tokens_seen=0, teacher="t")
    assert stored(tmp_path / "a") == stored(tmp_path / "b") == stored(tmp_path / "c")
    targets = CacheReader(tmp_path / "a").read(one, digest[0]).targets
    assert targets.covered_T.all() and len(targets.ids_TK) == S
    assert np.asarray(CacheReader(tmp_path / "a").covers(one)).tolist() == [True]


def test_an_empty_put_and_an_empty_read(tmp_path):
    none = Atoms(*[torch.empty(0, dtype=torch.int32)] * 4)
    with CacheWriter(tmp_path, header(), writer="w") as writer:
        assert writer.put([], [], none, [], [], [], step=0, tokens_seen=0, teacher="t")
        assert writer.put_logits([], [], torch.empty(0, V), [], [], step=0, tokens_seen=0, teacher="t")
        writer.flush()
        assert writer.stats.samples == 0
    reader = CacheReader(tmp_path)
    for ids in ([], np.array([]), np.array([], np.int64), torch.tensor([])):
        result = reader.read(ids, [])
        assert (
            len(result.targets.ids_TK) == len(result.step_B) == len(reader.covers(ids)) == len(reader.steps(ids)) == 0
        )
        assert reader.records(ids) == [] and len(reader.digests(ids)) == 0


# ---------------------------------------------------------------- ranks


def test_counts_may_come_in_any_kind(tmp_path):
    counts = np.random.default_rng(0).integers(0, 9, V)
    for name, given in (
        ("a", counts),
        ("b", torch.from_numpy(counts)),
        ("c", counts.tolist()),
        ("d", counts.astype(float)),
    ):
        with CacheWriter(tmp_path / name, header(), writer="w", counts_V=given) as writer:
            put(writer, [1])
    bytes_of = [{p.name: p.read_bytes() for p in (tmp_path / name).glob("*.*")} for name in "abcd"]
    assert bytes_of[0] == bytes_of[1] == bytes_of[2] == bytes_of[3]


def test_without_counts_there_is_no_table_and_ids_are_ranks(tmp_path):
    with CacheWriter(tmp_path / "a", header(), writer="w") as writer:
        put(writer, [1])
    with CacheWriter(tmp_path / "b", header(), writer="w", counts_V=-np.arange(V)) as writer:
        put(writer, [1])
    assert not list((tmp_path / "a").glob("ranks*")) and '"ranks": ""' in (tmp_path / "a/cache.json").read_text()
    assert list((tmp_path / "b").glob("ranks*"))
    assert stored(tmp_path / "a") == stored(tmp_path / "b")
    with pytest.raises(CacheError, match="ranks is empty in the cache"):
        CacheWriter(tmp_path / "a", header(), writer="w", counts_V=np.arange(V))
