"""Ids that a search finds are those of whole numbers, whatever the device, its exponential and the order of sums."""

import importlib.util
import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

from distill.cache import make_codec
from distill.cache.codecs import fixed_point
from distill.cache.codecs.search import by_tensors, search
from distill.config.registry import CODECS
from distill.config.schema import CodecConfig
from tests.hard_rows import CASES, assert_same, hard_rows

NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def asked(logits_TV, points_TK, *heads):
    return search(logits_TV, logits_TV.logsumexp(-1), points_TK, *heads)


@pytest.mark.parametrize("scale", [0.0, 1.0, 8.0, 40.0])
@pytest.mark.parametrize("vocab", [1, 63, 512, 5001])
def test_a_cpu_finds_what_operations_on_tensors_find(vocab, scale):
    logits_TV = hard_rows(40, vocab, scale)
    finite_T = logits_TV.logsumexp(-1).isfinite()
    for points_TK, *heads in CASES(40, vocab):
        assert_same(asked(logits_TV, points_TK, *heads), by_tensors(logits_TV, finite_T, points_TK, *heads))


def test_threads_and_chunks_do_not_matter(monkeypatch):
    logits_TV, (points_TK, *heads) = hard_rows(50, 700, 3.0), CASES(50, 700)[1]
    finite_T = logits_TV.logsumexp(-1).isfinite()
    one, whole = asked(logits_TV, points_TK, *heads), by_tensors(logits_TV, finite_T, points_TK, *heads)
    monkeypatch.setattr("distill.cache.codecs.search._THREAD_WORK", 1000)
    monkeypatch.setattr("distill.cache.codecs.search._CHUNK", 7 * 700)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert_same(one, asked(logits_TV, points_TK, *heads))
    assert_same(whole, by_tensors(logits_TV, finite_T, points_TK, *heads))


def test_ids_are_those_of_whole_numbers():
    """By sums of Python's integers and exact fractions of them."""
    logits_TV = 4 * torch.randn(30, 300, generator=torch.Generator().manual_seed(1))
    (points_TK, *_) = CASES(30, 300)[0]
    found = asked(logits_TV, points_TK)
    weights_TV = fixed_point.weights(
        logits_TV, logits_TV.amax(-1, keepdim=True), fixed_point.fraction_bits(300)
    ).tolist()
    for t, weights in enumerate(weights_TV):
        assert sum(weights) == found.total_T[t]
        for point, got in zip(points_TK[t].tolist(), found.ids_TK[t].tolist()):
            below = sum(weights[:got])
            assert below - 1 < Fraction(point) * sum(weights) < below + weights[got]


def test_the_weight_is_the_exponential_and_never_falls():
    below = -torch.cat([torch.zeros(1), torch.logspace(-9, np.log10(20), 2**20, dtype=torch.float64).float()])
    weights = fixed_point.weights(below, torch.zeros(1), 44)
    want = below.double().exp() * 2.0**44
    assert ((weights - want).abs() <= 1e-7 * want + 1).all()
    assert (weights.diff() <= 0).all() and weights[0] == 2**44
    far = torch.tensor([-35.0, -36.5, -1e30, -torch.inf, torch.nan])
    assert fixed_point.weights(far, torch.zeros(1), 44).tolist() == [0] * 5


@pytest.mark.parametrize("vocab", [2, 202_048, 2**24])
def test_sums_of_the_largest_vocabularies_fit(vocab):
    """Of a flat row, by its terms: no id has more weight, and none has more spread than 1 / e."""
    assert vocab * 2 ** fixed_point.fraction_bits(vocab) < 2**62
    found = asked(torch.zeros(1, min(vocab, 202_048)), torch.tensor([[0.0, 1 - 2**-50]], dtype=torch.float64))
    assert found.ids_TK.tolist() == [[0, min(vocab, 202_048) - 1]]
    assert float(found.entropy_T) == pytest.approx(np.log(min(vocab, 202_048)), rel=1e-6)


def moved(ids_TK, other_TK):
    """How many ids of 100,000 differ."""
    return float((ids_TK != other_TK).double().mean() * 1e5)


def test_a_devices_exponential_moves_no_id(monkeypatch):
    """Off by one in the last bit, for every id or for half of them, it would move more than 1 in 100,000, if weights
    were made of it."""
    logits_TV = 3 * torch.randn(2, 202_048, generator=torch.Generator().manual_seed(0))
    points_TK = ((torch.arange(100_000) + torch.rand(2, 1)) / 100_000).double()
    lse_T, half_TV = logits_TV.logsumexp(-1), torch.rand(logits_TV.shape) < 0.5
    exp = torch.exp

    def off(x):
        return torch.where(half_TV, torch.nextafter(exp(x), torch.tensor(torch.inf)), exp(x))

    def of_floats(function):
        running_TV = (function(logits_TV - lse_T[:, None]).double() * 2**43).long().cumsum(-1)
        return torch.searchsorted(running_TV, (points_TK * running_TV[:, -1:].double()).long(), right=True)

    assert moved(of_floats(exp), of_floats(off)) > 3
    before = [found(logits_TV, points_TK).ids_TK for found in (asked, tensors)]
    monkeypatch.setattr(torch, "exp", off)
    monkeypatch.setattr(torch.Tensor, "exp", off)
    monkeypatch.setattr(np, "exp", lambda x: np.nextafter(x, np.inf))
    after = [found(logits_TV, points_TK).ids_TK for found in (asked, tensors)]
    assert [moved(before[0], ids_TK) for ids_TK in (*before, *after)] == [0.0] * 4


def tensors(logits_TV, points_TK):
    return by_tensors(logits_TV, logits_TV.logsumexp(-1).isfinite(), points_TK, 1.0, 0)


def test_the_log_sum_exp_of_another_device_moves_no_id():
    logits_TV = 3 * torch.randn(500, 400, generator=torch.Generator().manual_seed(0))
    lse_T, ids_T = logits_TV.logsumexp(-1), torch.arange(500)
    for name in CODECS.names:
        codec, where = make_codec(CodecConfig(name), 400), {"seed": 1, "sample_ids_T": ids_T, "positions_T": ids_T}
        one, other = (codec.select(logits_TV, lse, **where) for lse in (lse_T, torch.nextafter(lse_T, lse_T + 1)))
        assert all(map(torch.equal, one.atoms, other.atoms)) and torch.equal(one.entropy_T, other.entropy_T)


def test_of_equal_logits_topk_keeps_the_least_ids():
    """In bf16 logits are often equal, and what `topk` takes of them differs between devices."""
    logits_TV = (2 * torch.randn(60, 400, generator=torch.Generator().manual_seed(0))).bfloat16().float().round()
    logits_TV[0], logits_TV[1, 5:] = 0.0, -torch.inf
    ids_T = torch.arange(60)
    picks = make_codec(CodecConfig("topk", k=9), 400).pick(
        logits_TV, logits_TV.logsumexp(-1), seed=0, sample_ids_T=ids_T, positions_T=ids_T
    )
    for row, ids in zip(logits_TV.tolist(), picks.ids_TK.tolist()):
        assert sorted(ids) == sorted(sorted(range(400), key=lambda i: (-row[i], i))[:9])


@pytest.mark.parametrize("name", CODECS.names)
def test_shapes_do_not_depend_on_what_is_picked(name):
    ids_T, codec = torch.arange(6), make_codec(CodecConfig(name), 400)
    rows = torch.zeros(6, 400), hard_rows(6, 400, 40.0)
    one, other = (codec.pick(row, row.logsumexp(-1), seed=0, sample_ids_T=ids_T, positions_T=ids_T) for row in rows)
    assert [column.shape for column in one] == [column.shape for column in other]


@NEEDS_TRITON
def test_the_kernels_find_what_a_cpu_finds():
    """In Triton's interpreter."""
    done = worker("interpreted", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


@NEEDS_TRITON
def test_a_gpu_rounds_each_product_and_each_sum():
    """Of the machine code for an H100, which a CPU can make; a kernel that fuses them would find other ids."""
    done = worker("compiled", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr


def worker(*arguments, **variables):
    command = [sys.executable, "-m", "tests.workers.search_forms", *arguments]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=300)
