"""The head's products, chunks and memory; what it is given that it should not be."""

import math
import re
import subprocess
import sys
from functools import partial

import pytest
import torch

from losses import Mixed, divergences, fixed, head_loss, mixed_loss
from losses.bucketed import Bucketed
from losses.checked import Checked
from losses.dense import Dense
from losses.head import MOST_ROWS, rows_by_bytes
from losses.products import narrowed

T, D, V, K = 12, 6, 40, 3


def problem(seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(T, D, generator=g), torch.randn(V, D, generator=g)
    labels, ids = torch.randint(V, (T,), generator=g), torch.randperm(V, generator=g)[: T * K].view(T, K)
    probs = torch.softmax(torch.randn(T, K, generator=g), -1) * 0.9
    return hidden, weight, labels, ids, probs


def problem_rows(kind, labels, weigh, ids, probs, hidden, weight):
    if kind == "mixed":
        return Mixed(labels, weigh, ids, probs)
    if kind == "bucketed":
        return Bucketed(labels, weigh, ids, probs, divergences.forward_kl)
    return Dense(labels, weigh, torch.ones_like(hidden), weight.flip(0), divergences.forward_kl)


def problem_ids():
    return torch.stack([torch.arange(K) + t for t in range(T)])


@pytest.mark.parametrize("kind", ["mixed", "bucketed", "dense"])
@pytest.mark.parametrize("what", [math.nan, math.inf])
def test_a_masked_token_adds_nothing_to_any_gradient_whatever_its_hidden_state_holds(kind, what):
    hidden, weight, labels, _, _ = problem()
    ids, probs = problem_ids(), torch.full((T, K), 0.3)
    w = torch.full((T,), 0.5)
    w[4] = 0
    made = []
    for value in (1.0, what):
        leaf = hidden.clone()
        leaf[4, 2] = value
        leaves = [leaf.requires_grad_(), weight.clone().requires_grad_()]
        rows = problem_rows(kind, labels, fixed(w, w), ids, probs, hidden, weight)
        out = head_loss(*leaves, rows, chunk=5)
        made.append([out.loss_sum, *torch.autograd.grad(out.loss_sum, leaves)])
    assert all(map(torch.equal, *made)) and not made[1][1][4].any()


@pytest.mark.parametrize("kind", ["mixed", "bucketed", "dense"])
def test_a_token_that_counts_shows_its_nan(kind):
    hidden, weight, labels, _, _ = problem()
    ids, probs, w = problem_ids(), torch.full((T, K), 0.3), torch.full((T,), 0.5)
    hidden[4, 2] = math.nan
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    rows = problem_rows(kind, labels, fixed(w, w), ids, probs, torch.ones(T, D), weight.detach())
    out = head_loss(*leaves, rows, chunk=5)
    grads = torch.autograd.grad(out.loss_sum, leaves)
    assert out.loss_sum.isnan() and all(grad.isnan().any() for grad in grads)


@pytest.mark.parametrize("kind", ["mixed", "bucketed", "dense"])
def test_a_soft_term_of_weight_0_adds_nothing_to_any_gradient_whatever_its_target_holds(kind):
    hidden, weight, labels, ids, probs = problem()
    w_hard, w_soft, made = torch.full((T,), 0.5), torch.full((T,), 0.5), []
    w_soft[4] = 0
    for value in (0.25, math.nan):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        probs[4, 0] = value
        rows = problem_rows(kind, labels, fixed(w_hard, w_soft), ids, probs, hidden, weight)
        if kind == "dense":
            rows.hidden_TE[4, 0] = value
        out = head_loss(*leaves, rows, chunk=5)
        made.append([out.loss_sum, *torch.autograd.grad(out.loss_sum, leaves)])
    torch.testing.assert_close(*made)


def test_an_id_that_the_student_cannot_give_makes_no_nan_of_a_whole_distribution():
    """The teacher has no probability for it either, since its vocabulary is smaller."""
    hidden, weight, labels, *_ = problem()
    w, logits = torch.full((T,), 0.5), torch.randn(T, V)
    logits[:, 30:] = -math.inf
    rows = Dense(labels % 30, fixed(w, w), hidden, weight[:30], divergences.forward_kl)
    whole = rows(logits.clone(), slice(0, T), torch.float32)
    part = rows(logits[:, :30].clone(), slice(0, T), torch.float32)
    torch.testing.assert_close(whole.loss_t, part.loss_t)
    torch.testing.assert_close(whole.grad_tV[:, :30], part.grad_tV)
    assert not whole.grad_tV[:, 30:].any()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_none_is_made(mode):
    """An evaluation would pay for two more products, and for a gradient of the unembedding's size."""
    hidden, weight, labels, *_ = problem()
    asked, rows = [], Mixed(labels, fixed(torch.ones(T)))

    def watched(logits_tV, part, want_grad):
        asked.append(want_grad)
        return rows(logits_tV, part, want_grad)

    with mode():
        head_loss(hidden.requires_grad_(), weight.requires_grad_(), watched, chunk=5)
    assert asked == [None] * 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["transposed", "every second", "wider"])
def test_any_layout_and_width_of_the_operands(layout, dtype):
    hidden, weight, labels, ids, probs = problem()
    half, plain = torch.full((T,), 0.5), [x.to(dtype) for x in (hidden, weight)]
    laid = {
        "transposed": lambda x: x.T.contiguous().T,
        "every second": lambda x: x.repeat_interleave(2, -1)[:, ::2],
        "wider": lambda x: x if len(x) == T else x.double(),
    }[layout]
    made = []
    for operands in (plain, map(laid, plain)):
        leaves = [x.detach().requires_grad_() for x in operands]
        loss = mixed_loss(*leaves, labels, half, ids, probs, half, chunk=5).loss_sum
        made.append((leaves, [loss, *torch.autograd.grad(loss, leaves)]))
    (_, want), (leaves, found) = made
    assert [x.dtype for x in leaves] == [x.dtype for x in found[1:]]
    for mine, other in zip(found, want):
        torch.testing.assert_close(mine.double(), other.double(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("tokens", [3, 257, 32_867])
def test_gradients_of_a_mean_are_rounded_once(tokens):
    """Multiplied by 1 / 257 in bf16, hidden states' gradients all come out a fifth of a percent short."""
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(64, 64, generator=g).bfloat16(), torch.randn(200, 64, generator=g).bfloat16()]
    exact = [x.double().requires_grad_() for x in leaves]
    leaves, labels = [x.requires_grad_() for x in leaves], torch.randint(200, (64,), generator=g)
    (mixed_loss(*leaves, labels, torch.ones(64)).loss_sum * torch.tensor(1 / tokens)).backward()
    torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, labels, reduction="sum").div(tokens).backward()
    for mine, want in zip(leaves, exact):
        assert ((mine.grad.double() * want.grad).sum() / want.grad.square().sum() - 1).abs() < 6e-4


@pytest.mark.parametrize("kind", ["mixed", "bucketed", "dense"])
def test_autocast_rounds_operands_and_no_logits(kind):
    g = torch.Generator().manual_seed(0)
    hidden, weight, *teacher = (torch.randn(n, 64, generator=g).bfloat16().float() for n in (T, V, T, V))
    _, _, labels, ids, probs = problem()
    half = torch.full((T,), 0.5)
    rows = problem_rows(kind, labels, fixed(half, half), ids, probs, *teacher)
    if kind == "dense":
        rows = rows._replace(hidden_TE=teacher[0])
    want = head_loss(hidden, weight, rows, chunk=5).parts
    with torch.autocast("cpu", torch.bfloat16):
        found = head_loss(hidden, weight, rows, chunk=5).parts
    assert all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize("chunk", [3, None])
def test_of_bf16_operands_loss_and_gradients_are_those_of_fp64(chunk):
    """Losses within 1e-4 nats and gradients within half a percent, at logits with a standard deviation of 10."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 256, generator=g), torch.randn(2000, 256, generator=g) * 10 / 16
    labels, ids = torch.randint(2000, (64,), generator=g), torch.randint(2000, (64, 8), generator=g)
    probs, half = torch.full((64, 8), 0.125), torch.full((64,), 0.5)
    leaves = [x.bfloat16().requires_grad_() for x in (hidden, weight)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    out = mixed_loss(*leaves, labels, half, ids, probs, half, chunk=chunk)
    out.loss_sum.backward()
    logp = torch.log_softmax(exact[0] @ exact[1].T, -1)
    hard_T = -logp[torch.arange(64), labels]
    (0.5 * hard_T - 0.5 * (probs * logp.gather(-1, ids)).sum(-1)).sum().backward()
    assert (out.hard_T - hard_T).abs().max() < 1e-4
    for mine, want in zip(leaves, exact):
        assert mine.grad.dtype == torch.bfloat16
        assert (mine.grad.double() - want.grad).norm() < 0.005 * want.grad.norm()


def test_autocast_rounds_the_operands_and_gives_gradients_of_the_leaves_own_dtype():
    hidden, weight, labels, ids, probs = problem()
    half = torch.full((T,), 0.5)
    plain = [x.bfloat16().float().requires_grad_() for x in (hidden, weight)]
    cast = [x.clone().requires_grad_() for x in (hidden, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        out = mixed_loss(*cast, labels, half, ids, probs, half)
    out.loss_sum.backward()
    want = mixed_loss(*plain, labels, half, ids, probs, half)
    want.loss_sum.backward()
    assert torch.equal(out.hard_T, want.hard_T)
    for mine, other in zip(cast, plain):
        assert mine.grad.dtype == torch.float32
        torch.testing.assert_close(mine.grad, other.grad, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 1000])
def test_narrowing_in_place_rounds_as_a_copy_does(count):
    matrix = torch.randn(1, count)
    want = matrix.bfloat16()
    got = narrowed(matrix, torch.bfloat16)
    assert torch.equal(got, want) and got.untyped_storage().data_ptr() == matrix.untyped_storage().data_ptr()


def test_a_graph_that_is_kept_can_be_gone_through_again():
    hidden, weight, labels, *_ = problem()
    hidden.requires_grad_()
    loss = mixed_loss(hidden, weight, labels, torch.ones(T)).loss_sum
    first = torch.autograd.grad(3 * loss, hidden, retain_graph=True)
    again = torch.autograd.grad(3 * loss, hidden)
    assert torch.equal(*first, *again)


def test_chunks_are_chosen_by_bytes_and_alike():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert rows_by_bytes(40 * MOST_ROWS, 512, cpu) == MOST_ROWS and rows_by_bytes(300, 512, cpu) == 320
    assert rows_by_bytes(4096, 202_048, cpu) * 202_048 * 4 <= 256 << 20
    assert rows_by_bytes(8192, 202_048, gpu) == 2048
    assert rows_by_bytes(8192, 202_048, gpu, tensors=4) * 202_048 * 16 <= 2 << 30
    assert rows_by_bytes(0, 202_048, gpu) == rows_by_bytes(5, 1 << 40, gpu) == 1


@pytest.mark.parametrize("chunk", [0, -1])
def test_a_chunk_below_1_is_refused(chunk):
    hidden, weight, labels, *_ = problem()
    with pytest.raises(ValueError, match=f"chunk is {chunk}; at least 1"):
        mixed_loss(hidden, weight, labels, torch.ones(T), chunk=chunk)


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("labels", (7,), -100, "labels_T[7] is -100; allowed: 0 to 39"),
        ("labels", (7,), 40, "labels_T[7] is 40; allowed: 0 to 39"),
        ("ids", (6, 1), 1 << 40, "ids_TK[6, 1] is 1.09951e+12; allowed: 0 to 39"),
        ("probs", (6, 1), math.nan, "probs_TK[6, 1] is nan; allowed: 0 to 1"),
        ("probs", (6, 1), -0.5, "probs_TK[6, 1] is -0.5; allowed: 0 to 1"),
        ("probs", (6,), 0.9, "mass[6] is 2.7; allowed: 0 to 2"),
        ("w_hard", (5,), 1.5, "w_hard[5] is 1.5; allowed: 0 to 1"),
        ("w_soft", (5,), math.inf, "w_soft (alpha)[5] is inf; allowed: 0 to 1"),
    ],
)
@pytest.mark.parametrize("kind", ["mixed", "bucketed"])
def test_debugging_names_what_is_out_of_range(kind, name, place, value, message):
    hidden, weight, labels, ids, probs = problem()
    given = {"labels": labels, "ids": ids, "probs": probs, "w_hard": torch.rand(T), "w_soft": torch.rand(T)}
    weigh = fixed(given["w_hard"], given["w_soft"])
    make = partial(problem_rows, kind, labels, weigh, ids, probs, hidden, weight)
    assert torch.equal(*(head_loss(hidden, weight, rows, chunk=5).loss_sum for rows in (make(), Checked(make()))))
    given[name][place] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        head_loss(hidden, weight, Checked(make()), chunk=5)


PEAK = """
import torch
from losses import mixed_loss
from tests.bench._memory import most_mb
T, D, V = 96, 128, 60_000
dtype = getattr(torch, "{dtype}")
hidden, weight = torch.randn(T, D).to(dtype).requires_grad_(), torch.randn(V, D).to(dtype).requires_grad_()
labels, ids, half = torch.randint(V, (T,)), torch.randint(V, (T, 12)), torch.full((T,), 0.5)
mixed_loss(hidden[:2], weight[:2], labels[:2] * 0, half[:2]).loss_sum.backward()
weight.grad = hidden.grad = None
before = most_mb()
mixed_loss(hidden, weight, labels, half, ids, torch.full((T, 12), 1 / 12), half, chunk=48).loss_sum.backward()
print(most_mb() - before)
"""


@pytest.mark.parametrize(("dtype", "operands"), [("float32", 0), ("bfloat16", 1)])
def test_forward_and_backward_hold_one_chunk_and_one_gradient(dtype, operands):
    """In fp32, and beside them on a CPU the unembedding in fp32 where it is given in less."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK.format(dtype=dtype)], check=True, stdout=subprocess.PIPE, text=True
    )
    gradient, chunk = 60_000 * 128 * 4 / 2**20, 48 * 60_000 * 4 / 2**20
    assert float(done.stdout) < (1 + operands) * gradient + chunk + 6
