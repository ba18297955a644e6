"""Codecs: expected values against fp64 softmax, and records that depend on nothing but seed, sample and position."""

from statistics import NormalDist

import numpy as np
import pytest
import torch

from distill.cache import Atoms, make_codec
from distill.config.errors import CacheError
from distill.config.schema import CodecConfig

CODECS = [
    CodecConfig("threshold", tau=0.05),
    CodecConfig("threshold", tau=0.3),
    CodecConfig("multinomial", draws=20),
    CodecConfig("systematic", draws=20),
    CodecConfig("systematic", draws=3),
    CodecConfig("topk", k=6),
]
SAMPLED, TOPK = CODECS[:-1], CODECS[-1]


def selection(config, logits_TV, seed=3, sample=0, first=0):
    """Of one sample whose tokens start at position `first`."""
    tokens = len(logits_TV)
    return make_codec(config, logits_TV.shape[1]).select(
        logits_TV,
        logits_TV.float().logsumexp(-1),
        seed=seed,
        sample_ids_T=torch.full((tokens,), sample),
        positions_T=torch.arange(first, first + tokens),
    )


def select(*args, **kwargs):
    return selection(*args, **kwargs).atoms


def dense(config, atoms, vocab):
    """float64 numpy [T, V] of what is decoded."""
    ids_TK, probs_TK = make_codec(config, vocab).decode(atoms)
    out = np.zeros((len(ids_TK), vocab))
    np.add.at(out, (np.arange(len(ids_TK))[:, None], ids_TK.numpy()), probs_TK.double().numpy())
    return out


def oracle(logits_V):
    """Softmax in fp64."""
    z = np.exp(logits_V.double().numpy() - logits_V.double().numpy().max())
    return z / z.sum()


def worst_z(decoded, logits_V):
    """Largest |z| over ids of the mean of many resamples [R, V]."""
    error = decoded.mean(0) - oracle(logits_V)
    spread = decoded.std(0) / np.sqrt(len(decoded))
    return np.max(np.abs(error) / np.maximum(spread, 1e-6))


def resampled(config, logits_V, resamples=20_000):
    """Many resamples of one row, each at its own position."""
    return dense(config, select(config, logits_V.expand(resamples, -1)), len(logits_V))


def bound(logits_V):
    """What |z| of no id exceeds but once in 10,000 tests, if the expected value is the distribution (Bonferroni)."""
    return NormalDist().inv_cdf(1 - 1e-4 / (2 * len(logits_V)))


ROWS = {
    "peaked": -2.0 * torch.log(torch.arange(1.0, 41.0)),
    "flat": -0.2 * torch.log(torch.arange(1.0, 41.0)).flip(0),
    "two peaks": torch.cat([torch.zeros(2), torch.full((43,), -4.0)]).roll(7),
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("config", CODECS, ids=str)
def test_expected_value_is_the_distribution_unless_the_codec_says_otherwise(config, row):
    logits_V = ROWS[row]
    z = worst_z(resampled(config, logits_V), logits_V)
    assert (z < bound(logits_V)) == make_codec(config, len(logits_V)).unbiased


@pytest.mark.parametrize("row", ROWS)
def test_the_test_of_bias_has_teeth(row):
    """Unique ids of a sample with the teacher's own probabilities, made to sum to 1: biased."""
    logits_V = ROWS[row]
    p_V = oracle(logits_V)
    kept = (resampled(CodecConfig("multinomial", draws=20), logits_V) > 0) * p_V
    assert worst_z(kept / kept.sum(1, keepdims=True), logits_V) > bound(logits_V)


@pytest.mark.parametrize("config", CODECS[:2], ids=str)
def test_threshold_keeps_the_large_and_counts_the_small(config):
    logits_TV = 3 * torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    atoms = select(config, logits_TV)
    ids, codes = (torch.split(column, atoms.counts_T.tolist()) for column in (atoms.ids_N, atoms.codes_N))
    heads, tails = ([i[(c > 0) == wanted] for i, c in zip(ids, codes)] for wanted in (True, False))
    decoded = dense(config, atoms, 300)
    for t, logits_V in enumerate(logits_TV):
        p = oracle(logits_V)
        large = set(np.flatnonzero(p >= config.tau))
        assert set(heads[t].tolist()) == large
        assert len(set(tails[t].tolist())) == len(tails[t]) and not large & set(tails[t].tolist())
        assert abs(len(tails[t]) - p[p < config.tau].sum() / config.tau) < 1
        ratio = decoded[t, list(large)] / p[list(large)]
        assert (np.abs(np.log(ratio)) <= -np.log(config.tau) / 255 + 1e-4).all()


@pytest.mark.parametrize("config", CODECS[2:4], ids=str)
def test_draws_add_up(config):
    atoms = select(config, torch.randn(50, 33))
    assert [int(c.sum()) for c in torch.split(atoms.codes_N, atoms.counts_T.tolist())] == [20] * 50


def test_systematic_draws_an_id_as_often_as_its_share_says():
    """floor(N p) or ceil(N p) times, whatever the offset: no unbiased count has less variance."""
    logits_TV = 3 * torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    counts = 20 * dense(CODECS[3], select(CODECS[3], logits_TV), 300)
    want = 20 * np.stack([oracle(logits_V) for logits_V in logits_TV])
    assert (np.abs(counts - want) < 1 + 1e-3).all() and np.abs(counts - want).max() > 0.9


@pytest.mark.parametrize("config", [CODECS[0], CODECS[3], TOPK], ids=str)
def test_entropy_is_that_of_the_dense_distribution(config):
    logits_TV = 4 * torch.randn(30, 203, generator=torch.Generator().manual_seed(4))
    logits_TV[3, 5:] = -torch.inf
    p = np.stack([oracle(logits_V) for logits_V in logits_TV])
    want = -(p * np.log(np.where(p > 0, p, 1))).sum(1)
    assert np.abs(selection(config, logits_TV).entropy_T.numpy() - want).max() < 1e-5 * np.log(203)


def test_topk_keeps_the_residual_mass():
    logits_TV = 4 * torch.randn(64, 100, generator=torch.Generator().manual_seed(1))
    decoded = dense(TOPK, select(TOPK, logits_TV), 100)
    for t, logits_V in enumerate(logits_TV):
        top = np.sort(oracle(logits_V))[::-1][:6]
        np.testing.assert_allclose(np.sort(decoded[t])[::-1][:6], top, rtol=0.06)
        np.testing.assert_allclose(1 - decoded[t].sum(), 1 - top.sum(), rtol=0.03, atol=1e-6)


@pytest.mark.parametrize("config", CODECS, ids=str)
def test_chunks_do_not_matter(config):
    logits_TV = 2 * torch.randn(96, 203, generator=torch.Generator().manual_seed(2))
    whole = select(config, logits_TV)
    parts = [select(config, logits_TV[a:b], first=a) for a, b in ((0, 1), (1, 40), (40, 40), (40, 96))]
    for a, b in zip(whole, Atoms.cat(parts)):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("config", CODECS, ids=str)
def test_chunks_of_our_own_do_not_matter(config, monkeypatch):
    logits_TV = 2 * torch.randn(96, 203, generator=torch.Generator().manual_seed(2))
    whole = select(config, logits_TV)
    for size in (1, 7 * 203):
        monkeypatch.setattr("distill.cache.codecs.base._CPU_CHUNK", size)
        assert all(map(torch.equal, whole, select(config, logits_TV)))


@pytest.mark.parametrize("config", SAMPLED, ids=str)
def test_seed_sample_and_position_each_matter(config):
    logits_TV = torch.randn(1, 400).expand(40, -1)
    base = select(config, logits_TV)
    others = [
        select(config, logits_TV, seed=4),
        select(config, logits_TV, sample=1),
        select(config, logits_TV, first=40),
    ]
    for other in others:
        assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(base, other))
    assert len({tuple(row) for row in dense(config, base, 400)}) > 25


@pytest.mark.parametrize("config", CODECS, ids=str)
def test_vocabulary_of_llama_4(config):
    """Ids beyond 2**17 survive, bfloat16 works, and mass is found where it is."""
    logits_TV = torch.full((8, 202_048), -20.0)
    hot = torch.arange(8) * 1000 + 195_000
    logits_TV[torch.arange(8), hot] = 0.0
    logits_TV[torch.arange(8), hot + 1] = -1.0
    decoded = dense(config, select(config, logits_TV.bfloat16()), 202_048)
    expected = [oracle(row.bfloat16()) for row in logits_TV]
    for t in range(8):
        assert decoded[t, hot[t]] == pytest.approx(expected[t][hot[t]], rel=0.5)
        assert decoded[t].argmax() == hot[t]


@pytest.mark.parametrize("config", SAMPLED, ids=str)
def test_small_probabilities_of_a_large_vocabulary_are_not_lost(config):
    """Half of the mass lies in 200,000 ids of 2.5e-6, which a running float32 sum would round badly."""
    logits_V = torch.full((200_000,), float(np.log(0.5 / 199_999)))
    logits_V[0] = np.log(0.5)
    ids = dense(config, select(config, logits_V.expand(60, -1)), 200_000).sum(0)
    halves = ids[1:100_000].sum(), ids[100_000:].sum()
    assert halves[0] / 60 == pytest.approx(0.25, abs=0.05) and halves[1] / 60 == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("config", SAMPLED, ids=str)
def test_a_broken_row_leaves_the_others_alone(config):
    logits_TV = torch.randn(3, 64)
    whole = dense(config, select(config, logits_TV), 64)
    logits_TV[1] = torch.nan
    broken = dense(config, select(config, logits_TV), 64)
    assert (broken[[0, 2]] == whole[[0, 2]]).all() and not broken[1].any()


@pytest.mark.parametrize("config", CODECS, ids=str)
def test_one_certain_id(config):
    logits_TV = torch.full((4, 50), -torch.inf)
    logits_TV[:, 17] = 0.0
    decoded = dense(config, select(config, logits_TV), 50)
    np.testing.assert_allclose(decoded[:, 17], 1, atol=1e-4)
    np.testing.assert_allclose(decoded.sum(1), 1, atol=1e-4)


@pytest.mark.parametrize(
    "config, found",
    [
        (CodecConfig("threshold", tau=0.0), "tau is 0.0"),
        (CodecConfig("multinomial", draws=1001), "draws is 1001"),
        (CodecConfig("systematic", draws=0), "draws is 0"),
        (CodecConfig("topk", k=101), "k is 101"),
        (CodecConfig("nucleus"), "codec.name is nucleus; allowed: systematic, threshold, multinomial, topk"),
    ],
)
def test_what_cannot_be_stored_is_refused(config, found):
    with pytest.raises(CacheError, match=found):
        make_codec(config, 100)
