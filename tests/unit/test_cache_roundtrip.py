"""From put to read: nothing is lost, nothing depends on how samples came, and what is on disk is what the page says."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open

from distill.cache import Atoms, CacheHeader, CacheReader, CacheWriter, make_codec
from distill.config import registry
from distill.config.errors import CacheError
from distill.config.schema import CodecConfig, OnFull
from tests import format_reader
from tests.workers.cache_writers import SAMPLES, S, V, batch, digests, header, put, same_row

CODECS = [CodecConfig(name) for name in registry.CODECS.names]


def decode(codec, atoms, vocab=V):
    return make_codec(codec, vocab).decode(atoms)


@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)
def test_what_is_read_is_what_was_put(tmp_path, codec):
    """In another order, with gaps, against the codec's own decoding of atoms that never met the disk."""
    with CacheWriter(tmp_path, header(codec), writer="w", counts_V=np.arange(V) % 17, shard_samples=3) as writer:
        for ids in ([3, 1], [7], [0, 2, 9], [30]):
            assert put(writer, ids, codec)
    want = batch([9, 30, 3], codec)
    ids_TK, probs_TK = decode(codec, want.atoms)
    result = CacheReader(tmp_path).read(np.array([9, 8, 30, 3]), digests([9, 8, 30, 3]))
    targets = result.targets
    covered = torch.cat([want.valid[:S], torch.zeros(S, dtype=torch.bool), want.valid[S:]])
    assert torch.equal(targets.covered_T, covered)
    assert [t.dtype for t in targets] == [torch.int64, torch.float32, torch.bool, torch.float32, torch.float32]
    rows = torch.cat([torch.arange(S), torch.full((S,), -1), torch.arange(S, 3 * S)])
    for t, row in enumerate(rows.tolist()):
        if covered[t]:
            assert same_row(targets, t, ids_TK[row], probs_TK[row])
            nll, entropy = -want.label_logprob[row].item(), want.entropy[row].item()
            assert abs(targets.label_logprob_T[t] + nll) <= math.sqrt(32 * nll) / 254 + 2e-4
            assert abs(targets.entropy_T[t] - entropy) <= math.sqrt(entropy * math.log(V)) / 255 + 1e-4
        else:
            assert not any(column[t].any() for column in targets)
    assert result.step_B.tolist() == [0, -1, 0, 0]
    assert torch.isnan(result.shard_loss_B).tolist() == [False, True, False, False]
    shard = batch([0, 2, 9], codec)
    loss = -shard.label_logprob[shard.valid].double().mean()
    assert result.shard_loss_B[0] == pytest.approx(loss.item(), rel=1e-6)


def test_a_reader_of_nothing(tmp_path):
    CacheWriter(tmp_path, header(), writer="w").close()
    reader = CacheReader(tmp_path)
    result = reader.read(np.array([1, 2]), digests([1, 2]))
    assert result.targets.ids_TK.shape == (2 * S, 1) and not result.targets.covered_T.any()
    assert reader.stats()["samples"] == 0 and not reader.finished


def records(folder):
    """Record, digest and check of every sample, by plain safetensors."""
    found = {}
    for path in folder.glob("shards/*/*/*"):
        with safe_open(path, "np") as file:
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        ends = [0, *columns["ends"].tolist()]
        for i, sample in enumerate(columns["sample_ids"].tolist()):
            fixed = [columns[name][i].tobytes() for name in ("digests", "checks", "atoms")]
            found[sample] = [*fixed, columns["records"][ends[i] : ends[i + 1]].tobytes()]
    return found


def test_a_record_has_the_same_bytes_however_it_came(tmp_path):
    counts = np.random.default_rng(0).integers(0, 99, V)
    for name, shard_samples, batches in (
        ("a", 256, [range(20)]),
        ("b", 1, [[i] for i in reversed(range(20))]),
        ("c", 4, [[5, 1, 9], [0, 2, 3, 4], [19, 18, 17, 6, 7, 8], range(10, 17)]),
    ):
        with CacheWriter(
            tmp_path / name, header(), writer=name, counts_V=counts, shard_samples=shard_samples
        ) as writer:
            for ids in batches:
                put(writer, list(ids))
    a, b, c = (records(tmp_path / name) for name in "abc")
    assert sorted(a) == list(range(20)) and a == b == c


@pytest.mark.parametrize("counts", [np.random.default_rng(1).integers(0, 9, V), None], ids=["ranks", "no ranks"])
@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)
def test_the_page_is_enough_to_read_a_cache(tmp_path, codec, counts):
    """A slow reader written from the format's description alone finds what was put."""
    with CacheWriter(tmp_path, header(codec), writer="w", counts_V=counts) as writer:
        put(writer, [4, 2, 6], codec)
    assert format_reader.catalog(tmp_path) == format_reader.newest(tmp_path)
    found = format_reader.cache(tmp_path)
    for sample in (4, 2, 6):
        want = batch([sample], codec)
        step, digest, tokens = found[sample]
        assert (step, digest) == (0, int(digests([sample])[0]))
        ids, codes = (
            torch.split(column, want.atoms.counts_T.tolist()) for column in (want.atoms.ids_N, want.atoms.codes_N)
        )
        assert [token is not None for token in tokens] == want.valid.tolist()
        parameters = {"name": codec.name} | (
            {"draws": codec.draws} if "draws" in registry.CODECS[codec.name].parameters else {"tau": codec.tau}
        )
        probs = torch.split(make_codec(codec, V).probs(want.atoms), want.atoms.counts_T.tolist())
        for t in np.flatnonzero(want.valid).tolist():
            entropy, label, rest, atoms = tokens[t]
            assert dict(atoms) == dict(zip(ids[t].tolist(), codes[t].tolist())) and len(atoms) == len(ids[t])
            assert rest == (want.atoms.rest_T[t] if codec.name == "topk" else None)
            assert math.log(V) * (entropy / 255) ** 2 == pytest.approx(want.entropy[t].item(), abs=0.06)
            assert -32 * (label / 255) ** 2 == pytest.approx(want.label_logprob[t].item(), abs=0.1)
            mine = {i: format_reader.probability(code, parameters) for i, code in atoms}
            if codec.name == "topk":
                scale = (1 - 10 ** (-6 * (1 - rest / 255))) / sum(mine.values())
                mine = {i: p * scale for i, p in mine.items()}
            assert mine == pytest.approx(dict(zip(ids[t].tolist(), probs[t].tolist())), rel=1e-5)


def test_ids_beyond_seventeen_bits(tmp_path):
    vocab = 202_048
    counts = np.random.default_rng(0).integers(0, 1000, vocab)
    atoms = Atoms(
        torch.full((S,), 3, dtype=torch.int32),
        torch.tensor([[202_047, 131_073, 180_000 + t] for t in range(S)], dtype=torch.int32).flatten(),
        torch.tensor([12, 7, 1] * S, dtype=torch.int32),
        torch.empty(0, dtype=torch.uint8),
    )
    with CacheWriter(tmp_path, header(vocab_size=vocab), writer="w", counts_V=counts) as writer:
        zeros = torch.zeros(S)
        writer.put(np.array([11]), digests([11]), atoms, zeros, zeros, zeros == 0, step=0, tokens_seen=0, teacher="t")
    targets = CacheReader(tmp_path).read(np.array([11]), digests([11])).targets
    for t, (ids_K, probs_K) in enumerate(zip(*decode(CodecConfig(), atoms, vocab))):
        assert same_row(targets, t, ids_K, probs_K)
        assert targets.ids_TK[t].max() == 202_047


def test_the_later_teacher_wins_and_counts_once(tmp_path):
    """By step, then by writer's name, then by shard; whatever the order in which a reader finds the shards."""
    with CacheWriter(tmp_path, header(), writer="b") as b, CacheWriter(tmp_path, header(), writer="a") as a:
        put(b, [1, 2], step=5)
        b.flush()
        early = CacheReader(tmp_path)
        put(a, [2, 3], step=5)
        put(a, [1, 3], step=4)
        a.flush()
        assert put(a, [3, 3], step=9) and a.stats.passed == 3
    late = CacheReader(tmp_path)
    assert early.refresh() == 2 and early.refresh() == 0
    for reader in (early, late):
        result = reader.read(np.array([1, 2, 3]), digests([1, 2, 3]))
        assert result.step_B.tolist() == [5, 5, 9]
        for n, (sample, step) in enumerate(((1, 5), (2, 5), (3, 9))):
            ids_TK, probs_TK = decode(CodecConfig(), batch([sample], step=step).atoms)
            assert same_row(result.targets, n * S, ids_TK[0], probs_TK[0])
        stats = reader.stats()
        assert (stats["samples"], stats["shards"], stats["coverage"]) == (3, 3, 3 / SAMPLES)
        assert stats["step"].tolist() == sorted(stats["step"]) and len(stats["loss"]) == 3
        sizes = [path.stat().st_size for path in tmp_path.glob("shards/*/*/*")]
        assert stats["bytes"] == sum(sizes) - sum(sorted(sizes)[:2])  # all but the two marks


def test_a_reader_follows_a_growing_cache(tmp_path):
    with CacheWriter(tmp_path, header(), writer="w", shard_samples=2) as writer:
        reader = CacheReader(tmp_path)
        for first in range(0, 8, 2):
            put(writer, [first, first + 1])
            writer.flush()
            assert not reader.covers(np.array([first]))[0]
            assert reader.refresh() == 1
            assert reader.covers(np.arange(SAMPLES)).tolist() == [i < first + 2 for i in range(SAMPLES)]
            assert not reader.finished
        put(writer, [20])
        writer.finish()
        assert reader.refresh() == 2 and reader.finished  # a shard and the mark of the end
        assert writer.stats[:2] == (9, 9 * (S - 1)) and writer.stats.bytes == reader.stats()["bytes"]
    with CacheWriter(tmp_path, header(), writer="w") as writer:  # a mark says that the stream goes on
        assert reader.refresh() == 1 and not reader.finished
        writer.finish()
        writer.finish()
        assert reader.refresh() == 1 and reader.finished
        put(writer, [21])
        writer.flush()
        assert reader.refresh() == 1 and not reader.finished
        writer.finish()
        assert reader.refresh() == 1 and reader.finished and reader.refresh() == 0


def test_one_shard_has_one_teacher(tmp_path):
    with CacheWriter(tmp_path, header(), writer="w") as writer:
        put(writer, [1], teacher="x", step=3)
        put(writer, [2], teacher="y", step=4)
    shards = [shard.header for _, shard in sorted(format_reader.shards(tmp_path).items())]
    origins = [[(o["teacher"], o["first_step"], o["last_step"]) for o in shard["origins"]] for shard in shards]
    assert origins == [[], [("x", 3, 3)], [("y", 4, 4)]]


def test_after_an_exception_nothing_more_is_published(tmp_path):
    with pytest.raises(ZeroDivisionError), CacheWriter(tmp_path, header(), writer="w") as writer:
        put(writer, [1])
        writer.flush()
        put(writer, [2])
        while writer._queue.qsize():
            pass
        raise ZeroDivisionError
    assert CacheReader(tmp_path).covers(np.array([1, 2])).tolist() == [True, False]
    with pytest.raises(AssertionError, match="after close"):
        put(writer, [3])


def test_a_full_queue_skips_and_counts(tmp_path, monkeypatch):
    import threading

    gate = threading.Event()
    publish = CacheWriter._publish
    monkeypatch.setattr(CacheWriter, "_publish", lambda self, b: (gate.wait(), publish(self, b)))
    with CacheWriter(tmp_path, header(), writer="w", shard_samples=1, queue=2, on_full=OnFull.skip) as writer:
        put(writer, [0])
        while writer._queue.qsize():
            pass
        assert [put(writer, [i, i + 1]) for i in (1, 3, 5, 7)] == [True, True, False, False]
        assert writer.stats.skipped == 4
        gate.set()
    assert CacheReader(tmp_path).covers(np.arange(9)).tolist() == [True] * 5 + [False] * 4


def test_a_full_queue_blocks(tmp_path):
    with CacheWriter(tmp_path, header(), writer="w", shard_samples=1, queue=1) as writer:
        assert all(put(writer, [i]) for i in range(12))
    assert CacheReader(tmp_path).stats()["samples"] == 12


def test_other_tokens_are_refused_by_name(tmp_path):
    with CacheWriter(tmp_path, header(), writer="w") as writer:
        put(writer, [4, 5])
    reader = CacheReader(tmp_path)
    wrong = digests([4, 5])
    wrong[1] = 0xABC
    with pytest.raises(
        CacheError, match=rf"{tmp_path}: sample 5 has digest {int(digests([5])[0]):016x}.*0000000000000abc"
    ):
        reader.read(np.array([4, 5]), wrong)


def test_what_cannot_be_stored_is_refused(tmp_path):
    with CacheWriter(tmp_path, header(), writer="w") as writer:
        bad = batch([3, 8])
        bad.label_logprob[S + 2] = torch.nan
        with pytest.raises(CacheError, match="sample 8, position 2: label_logprob_T is not finite"):
            writer.put(*bad, step=0, tokens_seen=0, teacher="t")
        with pytest.raises(CacheError, match="0 to 39"):
            put(writer, [40])
        with pytest.raises(CacheError, match="0 to 39"):
            CacheReader(tmp_path).covers(np.array([-1]))
        with pytest.raises(CacheError, match=r"id is not from 0 to 63: \d+"):
            put(writer, [1], vocab=200)
    for name in ("../x", "", "-x", "x" * 101, "a/b", "w.json"):
        with pytest.raises(CacheError, match=f"writer is {name!r}; allowed are up to 100 letters"):
            CacheWriter(tmp_path, header(), writer=name)
    for name in ("compact", "index", "merge", "repair", "tools"):
        with pytest.raises(CacheError, match=f"writer is '{name}'; a writer must not be called compact, index, merge"):
            CacheWriter(tmp_path, header(), writer=name)
    with pytest.raises(CacheError, match=r"vocab_size is 16777217"):
        CacheWriter(tmp_path / "big", header(vocab_size=2**24 + 1), writer="w")


# ---------------------------------------------------------------- header


@pytest.mark.parametrize(
    "change, found",
    [
        (dict(vocab_size=65), "vocab_size is 64 in the cache, 65 in this run"),
        (dict(tokenizer="kot"), "tokenizer is 'tok' in the cache, 'kot' in this run"),
        (dict(corpus="proc"), "corpus is 'corp' in the cache, 'proc' in this run"),
        (dict(sample_tokens=32), "sample_tokens is 16 in the cache, 32 in this run"),
        (dict(samples=41), "samples is 40 in the cache, 41 in this run"),
        (dict(seed=6), "seed is 5 in the cache, 6 in this run"),
        (dict(stream={"seed": 1}), "data.seed is 0 in the cache, 1 in this run"),
        (dict(stream={}), "it records the stream of a teacher in training, this run trains none: choose another cache"),
        (dict(codec=CodecConfig(draws=9)), "cache.codec.draws is 20 in the cache, 9 in this run"),
        (dict(codec=CodecConfig("topk")), "cache.codec.name is 'systematic' in the cache, 'topk' in this run"),
    ],
)
def test_another_cache_is_refused_with_both_values(tmp_path, change, found):
    CacheWriter(tmp_path, header(), writer="w").close()
    with pytest.raises(CacheError, match=found):
        CacheWriter(tmp_path, header(**change), writer="w2")
    with pytest.raises(CacheError, match=found):
        CacheHeader.load(tmp_path).check(**change)


def test_another_rank_table_is_refused(tmp_path):
    CacheWriter(tmp_path, header(), writer="w", counts_V=np.arange(V)).close()
    CacheWriter(tmp_path, header(), writer="w").close()  # takes the table that is there
    CacheWriter(tmp_path, header(), writer="w", counts_V=np.arange(V)).close()
    with pytest.raises(CacheError, match="ranks is"):
        CacheWriter(tmp_path, header(), writer="w", counts_V=-np.arange(V))
    with pytest.raises(CacheError, match=r"shape \(3,\); the vocabulary has 64"):
        CacheWriter(tmp_path, header(), writer="w", counts_V=np.arange(3))


def test_check_lists_everything_at_once(tmp_path):
    CacheWriter(tmp_path, header(), writer="w").close()
    loaded = CacheHeader.load(tmp_path)
    loaded.check(vocab_size=V, tokenizer="tok", codec=CodecConfig(tau=0.3), stream={"seed": 0, "steps": (1, 2)})
    with pytest.raises(CacheError, match=r"vocab_size is 64.*\n.*corpus is") as error:
        loaded.check(vocab_size=1, corpus="x", tokenizer="tok")
    assert "tokenizer" not in str(error.value)


def reseal(folder, **changes):
    from distill.cache.seal import seal, unseal

    path = folder / "cache.json"
    path.write_bytes(seal(unseal(path.read_bytes()) | changes, indent=1))


def test_what_a_reader_does_not_know_is_refused(tmp_path):
    with pytest.raises(CacheError, match="no cache here"):
        CacheReader(tmp_path / "nowhere")
    CacheWriter(tmp_path, header(), writer="w").close()
    reseal(tmp_path, codec={"name": "zip"})
    with pytest.raises(CacheError, match=r"codec\.name is zip; allowed: systematic, threshold, multinomial, topk"):
        CacheReader(tmp_path)
    for version in (1, 2, 4, "3", None):
        reseal(tmp_path, format=version)
        with pytest.raises(CacheError, match=f"format version is {version!r}; allowed is 3") as caught:
            CacheReader(tmp_path)
        assert (f"codistill-cache compact {tmp_path} --into NEW makes one" in str(caught.value)) == (version == 2)


def test_header_and_views_start_without_torch():
    code = "import sys, distill.cache.view, distill.cache.cataloging; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
