"""Batches: tokens and targets of each sample side by side, whatever the order and mixture; mismatches are refused."""

import json
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distill.cache import CacheHeader, CacheReader, CacheWriter, ReadResult, SoftTargets, make_codec
from distill.config.errors import CacheError
from distill.config.schema import CodecConfig, CorpusConfig, DataConfig, OnMissing, Source, TokenizerConfig
from distill.data.join import Joiner, check_cache
from distill.data.prefetch import Prefetch
from distill.data.prepare import prepare
from tests.cli import PATIENCE

S, V = 16, 300


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    corpora = {}
    for seed, name in enumerate(("main", "code")):
        words = np.random.default_rng(seed).choice(["sun", "moon", "star", "if", "x ="], (60, 12))
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": " ".join(row)}) + "\n" for row in words))
        corpora[name] = CorpusConfig(Source.files, [str(path)], held_out=0.0)
    return prepare(DataConfig(corpora, TokenizerConfig(vocab_size=V), sample_tokens=S), folder / "packed", V)


class FakeReader:
    """Targets that say whose they are: the id is the sample's, the probability the position's, K the corpus'."""

    def __init__(self, corpus: int, missing: tuple[int, ...] = ()):
        self.corpus, self.missing, self.width = corpus, missing, 2 + 3 * corpus
        self.header = SimpleNamespace(folder=f"cache-{corpus}")

    def read(self, sample_ids_B, digests_B) -> ReadResult:
        sample_ids = torch.as_tensor(sample_ids_B)
        there_B = torch.tensor([i not in self.missing for i in sample_ids_B.tolist()])
        sample_T, there_T = sample_ids.repeat_interleave(S), there_B.repeat_interleave(S)
        position_T = torch.arange(S).repeat(len(sample_ids))
        targets = SoftTargets(
            (sample_T * there_T)[:, None].expand(-1, self.width).clone(),
            (position_T * there_T / S)[:, None].expand(-1, self.width).clone(),
            there_T,
            -(sample_T * there_T).float(),
            (self.corpus + 1.0) * there_T,
        )
        loss_B = torch.where(there_B, sample_ids / 10, torch.nan)
        return ReadResult(
            targets, loss_B, torch.where(there_B, sample_ids * 2, -1), there_B.long() - 1, (("t", "capture"),)
        )


def test_tokens_labels_validity_and_documents_come_from_the_right_samples(data):
    corpora = list(data.train.values())
    corpus_B, ids_B = np.array([1, 0, 0, 1, 0]), np.array([3, 3, 0, len(corpora[1]) - 1, 3])
    batch = Joiner(corpora, None, OnMissing.hard).batch(corpus_B, ids_B)
    for b, (c, i) in enumerate(zip(corpus_B, ids_B)):
        sample = corpora[c].take(np.array([i]))
        assert batch.ids_BS[b].tolist() == sample.ids[0, :S].tolist()
        assert batch.labels_BS[b].tolist() == sample.ids[0, 1:].tolist()
        assert batch.documents_BS[b].tolist() == sample.documents[0, :S].tolist()
        assert batch.digests_B[b] == sample.digests[0]
        for s in range(S):
            within = sample.documents[0, s] == sample.documents[0, s + 1]
            assert bool(batch.valid_BS[b, s]) == within
    assert (batch.ids_BS.dtype, batch.labels_BS.dtype) == (torch.int64, torch.int64)
    assert (batch.valid_BS.dtype, batch.documents_BS.dtype) == (torch.bool, torch.int32)
    assert not batch.valid_BS.all() and batch.valid_BS.any()
    assert batch.targets is None and batch.shard_loss_B.isnan().all()
    assert batch.step_B.tolist() == [-1] * 5
    assert np.array_equal(batch.sample_ids_B, ids_B) and np.array_equal(batch.corpus_B, corpus_B)


def test_targets_of_a_mixture_stand_beside_their_tokens(data):
    readers = [FakeReader(0, missing=(5,)), FakeReader(1)]
    joiner = Joiner(list(data.train.values()), readers, OnMissing.hard)
    corpus_B, ids_B = np.array([1, 0, 1, 0, 0]), np.array([4, 5, 0, 9, 2])
    batch = joiner.batch(corpus_B, ids_B)
    targets = SoftTargets(*(column.unflatten(0, (5, S)) for column in batch.targets))
    assert targets.ids_TK.shape[-1] == 5
    for b, (c, i) in enumerate(zip(corpus_B.tolist(), ids_B.tolist())):
        there = (c, i) != (0, 5)
        assert (
            bool(batch.step_B[b] >= 0) == there == bool(targets.covered_T[b].all()) == bool(targets.covered_T[b].any())
        )
        assert batch.step_B[b] == (2 * i if there else -1)
        assert torch.isnan(batch.shard_loss_B[b]) if not there else batch.shard_loss_B[b] == pytest.approx(i / 10)
        width = 2 + 3 * c
        assert (targets.ids_TK[b, :, :width] == i * there).all() and (targets.ids_TK[b, :, width:] == 0).all()
        assert torch.equal(targets.probs_TK[b, :, 0], torch.arange(S) * there / S)
        assert (targets.probs_TK[b, :, width:] == 0).all()
        assert (targets.entropy_T[b] == (c + 1) * there).all() and (targets.label_logprob_T[b] == -i * there).all()


def test_rows_and_devices(data):
    joiner = Joiner(list(data.train.values()), [FakeReader(0), FakeReader(1)], OnMissing.hard)
    corpus_B, ids_B = np.array([1, 0, 1, 0]), np.array([4, 5, 0, 9])
    batch, part = joiner.batch(corpus_B, ids_B), joiner.batch(corpus_B[1:3], ids_B[1:3])
    rows = batch.rows(1, 3)
    for name in ("ids_BS", "labels_BS", "valid_BS", "documents_BS", "shard_loss_B", "step_B"):
        assert torch.equal(getattr(rows, name), getattr(part, name)), name
    for name in ("sample_ids_B", "corpus_B", "digests_B"):
        assert np.array_equal(getattr(rows, name), getattr(part, name)), name
    for ours, theirs in zip(rows.targets, part.targets):
        assert torch.equal(ours, theirs)
    moved = rows.to(torch.device("meta"))
    assert moved.documents_BS.device.type == "cpu"
    assert {moved.ids_BS.device.type, moved.targets.probs_TK.device.type, moved.step_B.device.type} == {"meta"}
    assert Joiner(list(data.train.values()), None, OnMissing.hard).batch(corpus_B, ids_B).rows(1, 3).targets is None


def test_a_missing_sample_may_be_refused(data):
    joiner = Joiner(list(data.train.values()), [FakeReader(0), FakeReader(1, (7,))], OnMissing.fail)
    assert joiner.batch(np.array([0, 1]), np.array([7, 6])).step_B.ge(0).all()
    with pytest.raises(CacheError, match=r"cache-1: has no targets of sample 7 of corpus 'code'; cache\.on_missing is"):
        joiner.batch(np.array([0, 1]), np.array([7, 7]))


# ------------------------------------------------------------ the real cache


@pytest.fixture
def cache(tmp_path, data):
    """A cache of the corpus `main` in which the even samples have an atom at (sample + position) mod V."""
    corpus = data.train["main"]
    codec = CodecConfig(name="threshold")
    header = CacheHeader(V, data.tokenizer.digest, corpus.digest, S, len(corpus), codec, seed=0)
    ids_B = np.arange(0, len(corpus), 2)
    batch = Joiner([corpus], None, OnMissing.hard).batch(np.zeros(len(ids_B), np.int64), ids_B)
    logits_TV = torch.zeros(len(ids_B) * S, V)
    logits_TV[torch.arange(len(ids_B) * S), owner(ids_B)] = 30.0
    with CacheWriter(tmp_path / "cache", header, writer="t", counts_V=corpus.counts_V(V)) as writer:
        atoms, _ = make_codec(codec, V).select(
            logits_TV,
            logits_TV.logsumexp(-1),
            seed=0,
            sample_ids_T=torch.as_tensor(ids_B).repeat_interleave(S),
            positions_T=torch.arange(S).repeat(len(ids_B)),
        )
        zeros_T = torch.zeros(len(ids_B) * S)
        valid_T = batch.valid_BS.flatten()
        arguments = (ids_B, batch.digests_B, atoms, zeros_T, zeros_T, valid_T)
        writer.put(*arguments, step=3, tokens_seen=1, teacher="someone")
        writer.finish()
    return CacheReader(tmp_path / "cache")


def owner(ids_B) -> torch.Tensor:
    return ((torch.as_tensor(ids_B)[:, None] + torch.arange(S)) % V).flatten()


def test_the_real_cache_is_joined_in_any_order(data, cache):
    check_cache(cache, data.tokenizer, data.train["main"], V)
    ids_B = np.array([6, 1, 4, 0, 4])
    batch = Joiner([data.train["main"]], [cache], OnMissing.hard).batch(np.zeros(5, np.int64), ids_B)
    assert batch.step_B.ge(0).tolist() == [True, False, True, True, True]
    assert batch.step_B.tolist() == [3, -1, 3, 3, 3]
    covered_T = batch.targets.covered_T
    assert torch.equal(covered_T, (batch.valid_BS & (batch.step_B >= 0)[:, None]).flatten())
    best_T = batch.targets.ids_TK.gather(1, batch.targets.probs_TK.argmax(1, keepdim=True))[:, 0]
    assert torch.equal(best_T[covered_T], owner(ids_B)[covered_T])


def test_other_tokens_than_the_teacher_saw_stop_the_run(data, cache):
    with pytest.raises(CacheError, match=r"sample 4 has digest [0-9a-f]{16} in the cache, [0-9a-f]{16} in this batch"):
        Joiner([data.train["code"]], [cache], OnMissing.hard).batch(np.zeros(1, np.int64), np.array([4]))


def test_a_foreign_cache_is_refused_with_both_values(data, cache):
    main, code = data.train["main"], data.train["code"]
    with pytest.raises(CacheError, match=rf"corpus is '{main.digest}' in the cache, '{code.digest}' in this run"):
        check_cache(cache, data.tokenizer, code, V)
    with pytest.raises(CacheError, match=r"vocab_size is 300 in the cache, 301 in this run"):
        check_cache(cache, data.tokenizer, main, V + 1)
    with pytest.raises(CacheError, match=rf"tokenizer is '{data.tokenizer.digest}' in the cache, 'other' in this run"):
        check_cache(cache, SimpleNamespace(digest="other"), main, V)

    class Longer:
        digest, sample_tokens = main.digest, 32

        def __len__(self):
            return len(main)

    with pytest.raises(CacheError, match=r"sample_tokens is 16 in the cache, 32 in this run"):
        check_cache(cache, data.tokenizer, Longer(), V)


# ------------------------------------------------------------ made ahead


def test_prefetch_keeps_order_and_stays_only_depth_ahead():
    made, taken = [], []

    def make(i):
        made.append(i)
        # depth waiting, one in the making, one in the consumer's hand
        assert len(made) - len(taken) <= 4
        return i * i

    with Prefetch(make, 3, 40, depth=2) as squares:
        for square in squares:
            taken.append(square)
            time.sleep(0.001)
    assert taken == [i * i for i in range(3, 40)] and made == list(range(3, 40))
    assert list(Prefetch(make, 5, 5)) == []


def test_prefetch_works_ahead_in_another_thread():
    started = threading.Event()
    with Prefetch(lambda i: started.set(), 0, 3):
        assert started.wait(PATIENCE)


def test_prefetch_raises_where_the_result_was_due():
    def make(i):
        if i == 2:
            raise CacheError("sample 2")
        return i

    seen = []
    with pytest.raises(CacheError, match="sample 2"), Prefetch(make, 0, 9) as items:
        for item in items:
            seen.append(item)
    assert seen == [0, 1]


def test_prefetch_stops_at_once():
    made = []
    with pytest.raises(KeyError), Prefetch(lambda i: made.append(i), 0, 10**9) as items:
        for _ in items:
            raise KeyError
    items._thread.join(PATIENCE)
    assert not items._thread.is_alive() and len(made) < 6
