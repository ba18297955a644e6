"""A student whose vocabulary is the teacher's with rows after it: what it may read, and what it learns from it."""

import dataclasses
import json
import math

import pytest
import torch

from distill.cache import CacheHeader, CacheReader, CacheWriter, make_codec
from distill.config.errors import CacheError
from distill.config.registry import CODECS
from distill.config.schema import (
    CodecConfig,
    EntropyFactor,
    LagFactor,
    ModelConfig,
    StudentConfig,
    TokenizerConfig,
    WeightingConfig,
)
from distill.data.join import check_cache
from distill.data.tokenizer import load_tokenizer, train_tokenizer
from losses import mixed_loss
from losses.weighting import Setting
from student.distilling import StudentRecipe
from tests.unit.test_student_distilling import ALONE, alphas, batch

T, D, V, PADDED = 24, 6, 48, 64


@pytest.mark.parametrize("name", CODECS.names)
def test_rows_after_the_teachers_get_no_mass_and_lose_theirs(name):
    """Against a dense target in fp64: what the codec stored, zeros after it; differentiated by torch."""
    g = torch.Generator().manual_seed(3)
    codec = make_codec(CodecConfig(name, k=5), V)
    logits_TV = 2 * torch.randn(T, V, generator=g)
    where = {"seed": 1, "sample_ids_T": torch.arange(T), "positions_T": torch.zeros(T, dtype=torch.long)}
    atoms = codec.select(logits_TV, logits_TV.logsumexp(-1), **where).atoms
    ids_TK, probs_TK = codec.decode(atoms)
    assert int(ids_TK.max()) < V
    dense_TV = torch.zeros(T, PADDED, dtype=torch.float64)
    for t in range(T):
        for i, p in zip(ids_TK[t].tolist(), probs_TK[t].tolist()):
            dense_TV[t, i] += p
    hidden_TD = torch.randn(T, D, generator=g, dtype=torch.float64, requires_grad=True)
    weight_VD = torch.randn(PADDED, D, generator=g, dtype=torch.float64, requires_grad=True)
    labels_T = torch.randint(V, (T,), generator=g)
    w_hard_T, w_soft_T = (torch.rand(T, generator=g, dtype=torch.float64) for _ in range(2))
    found = mixed_loss(hidden_TD, weight_VD, labels_T, w_hard_T, ids_TK, probs_TK, w_soft_T, chunk=7)
    got = torch.autograd.grad(found.loss_sum, (hidden_TD, weight_VD))
    logp_TV = torch.log_softmax(hidden_TD @ weight_VD.T, -1)
    hard_T = -logp_TV.gather(-1, labels_T[:, None])[:, 0]
    want = (w_hard_T * hard_T + w_soft_T * -(dense_TV * logp_TV).sum(-1)).sum()
    torch.testing.assert_close(found.loss_sum, want, rtol=1e-12, atol=1e-12)
    for one, other in zip(got, torch.autograd.grad(want, (hidden_TD, weight_VD))):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)

    # Soft targets alone push every row after the teacher's down, by the mass stored times what the student gives it.
    def gradient(z_V):
        eye = torch.eye(PADDED, dtype=torch.float64)
        z = z_V[None].clone().requires_grad_()
        part = mixed_loss(z, eye, labels_T[:1], torch.zeros(1), ids_TK[:1], probs_TK[:1], torch.ones(1)).loss_sum
        return torch.autograd.grad(part, z)[0][0]

    z_V = torch.randn(PADDED, generator=g, dtype=torch.float64)
    want_V = float(probs_TK[0].double().sum()) * z_V.softmax(-1)[V:]
    torch.testing.assert_close(gradient(z_V)[V:], want_V, rtol=1e-6, atol=1e-9)


def test_entropy_is_measured_against_the_teachers_vocabulary():
    weighting = WeightingConfig(alpha=1.0, lag=LagFactor(enabled=True), entropy=EntropyFactor(enabled=True, scale=True))
    config = StudentConfig(ModelConfig(vocab_size=PADDED), weighting=weighting)
    b = batch([2.0], entropy=2.0)
    for size in (V, PADDED):
        setting = Setting(PADDED, size, 1, 1000, math.inf, torch.device("cpu"))
        assert alphas(StudentRecipe(config, ALONE, setting, 10), b)[0] == pytest.approx(2.0 / math.log(size))


# ------------------------------------------------------------ which caches are read


class StubCorpus:
    digest, sample_tokens = "c", 8

    def __len__(self):
        return 5


@pytest.fixture(scope="module")
def own():
    return train_tokenizer(TokenizerConfig(vocab_size=280), ["the cat sat on the mat"] * 9)


@pytest.fixture
def cache(own, tmp_path):
    header = CacheHeader(288, own.digest, "c", 8, 5, CodecConfig(), 0)
    CacheWriter(tmp_path / "run" / "cache", header, writer="w").close()
    return CacheReader(tmp_path / "run" / "cache")


def changed(own, tmp_path, change):
    """The tokenizer with its file changed."""
    own.save(tmp_path / "changed.json")
    record = json.loads((tmp_path / "changed.json").read_text())
    change(record)
    (tmp_path / "changed.json").write_text(json.dumps(record))
    return load_tokenizer(TokenizerConfig(), tmp_path / "changed.json")


def added(record):
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    last = max(record["model"]["vocab"].values())
    record["added_tokens"].append({"id": last + 1, "content": "<|new|>", **flags})


def swapped(record):
    vocab = record["model"]["vocab"]
    a, b = list(vocab)[-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]


def lowered(record):
    record["normalizer"] = {"type": "Lowercase"}


@pytest.mark.parametrize("vocab_size", [288, 289, 640])
def test_a_padded_student_reads_and_a_smaller_one_is_told_why_not(own, cache, vocab_size):
    check_cache(cache, own, StubCorpus(), vocab_size, student=True)
    with pytest.raises(CacheError) as caught:
        check_cache(cache, own, StubCorpus(), 287, student=True)
    text = str(caught.value)
    assert "vocab_size is 288 in the cache, 287 in this run" in text
    assert "set student.model.vocab_size to at least as many" in text


@pytest.mark.parametrize("vocab_size", [287, 289])
def test_whoever_makes_targets_has_the_caches_vocabulary(own, cache, vocab_size):
    check_cache(cache, own, StubCorpus(), 288)
    with pytest.raises(CacheError, match=f"288 in the cache, {vocab_size} in this run.*a cache of its own"):
        check_cache(cache, own, StubCorpus(), vocab_size)


def test_a_tokenizer_that_only_adds_is_accepted_where_the_teachers_is_at_hand(own, cache, tmp_path):
    more = changed(own, tmp_path, added)
    assert more.extends(own) and own.extends(own) and not own.extends(more)
    with pytest.raises(
        CacheError, match=rf"set data\.tokenizer\.file .* or put its tokenizer\.json into {tmp_path}/run,"
    ):
        check_cache(cache, more, StubCorpus(), 640, student=True)
    more.save(tmp_path / "run" / "tokenizer.json")  # not the teacher's: nothing to compare with
    with pytest.raises(CacheError, match=r"data\.tokenizer\.file"):
        check_cache(cache, more, StubCorpus(), 640, student=True)
    own.save(tmp_path / "run" / "tokenizer.json")
    check_cache(cache, more, StubCorpus(), 640, student=True)
    with pytest.raises(CacheError, match=r"tokenizer is"):  # whoever makes targets needs the very same
        check_cache(cache, more, StubCorpus(), 288)
    other = StubCorpus()
    other.digest = "d"
    with pytest.raises(CacheError, match=r"corpus is 'c' in the cache, 'd' in this run; the tokenizer adds tokens"):
        check_cache(cache, more, other, 640, student=True)


@pytest.mark.parametrize("change", [swapped, lowered])
def test_ids_that_mean_something_else_are_refused(own, cache, tmp_path, change):
    own.save(tmp_path / "run" / "tokenizer.json")
    other = changed(own, tmp_path, change)
    assert not other.extends(own)
    with pytest.raises(CacheError, match=r"tokenizer is .* ids may mean something else: set data\.tokenizer\.file"):
        check_cache(cache, other, StubCorpus(), 640, student=True)


def test_a_mixtures_cache_finds_the_tokenizer_of_its_run(own, tmp_path):
    header = CacheHeader(288, own.digest, "c", 8, 5, CodecConfig(), 0)
    CacheWriter(tmp_path / "run" / "cache" / "main", header, writer="w").close()
    own.save(tmp_path / "run" / "tokenizer.json")
    check_cache(
        CacheReader(tmp_path / "run" / "cache" / "main"), changed(own, tmp_path, added), StubCorpus(), 288, student=True
    )


def test_everything_that_differs_is_named(own, cache):
    other = dataclasses.make_dataclass("Other", ["digest"])("x")
    with pytest.raises(CacheError) as caught:
        check_cache(cache, other, StubCorpus(), 8, student=True)
    assert all(part in str(caught.value) for part in ("vocab_size is 288", "tokenizer is", "student.model", "data.tok"))
