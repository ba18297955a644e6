"""The row function's two forms, in torch and in Triton's interpreter, against a dense target in fp64 autograd."""

import math
import os
import subprocess
import sys

import pytest
import torch

from losses import Mixed, fixed, head_loss, rows

FORMS = ["torch", "triton"]


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Either form on the CPU."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="the extra `kernels` is not installed")
        monkeypatch.setattr(rows, "_fused", lambda *_: True)
    return request.param


def problem(tokens=5, vocab=300, atoms=6, scale=3.0, seed=0):
    """Logits, labels, weights and atoms: ids repeat, the label is among them, one row without mass, some padding."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, vocab, generator=g) * scale
    labels = torch.randint(vocab, (tokens,), generator=g)
    ids = torch.randint(vocab, (tokens, atoms), generator=g)
    probs = torch.rand(tokens, atoms, generator=g) / atoms
    if atoms > 2:
        ids[:, 1], ids[:, 2] = ids[:, 0], labels
    if atoms > 4:
        probs[:, 4:], ids[:, 4:] = 0, ids[:, :1]  # padding with the id of an atom
    if tokens > 2:
        probs[2] = 0
    return logits, labels, torch.rand(tokens, generator=g), ids, probs, torch.rand(tokens, generator=g)


def oracle(logits, labels, w_hard, ids, probs, w_soft):
    """Loss of each row, its gradient and entropy."""
    z = logits.double().requires_grad_()
    logp = torch.log_softmax(z, -1)
    losses = []
    for t, row in enumerate(logp):
        loss = -w_hard[t].double() * row[labels[t]]
        for k, atom in enumerate(ids[t]):
            loss = loss - w_soft[t].double() * probs[t, k].double() * row[atom]
        losses.append(loss)
    losses = torch.stack(losses)
    (grad,) = torch.autograd.grad(losses.sum(), z)
    entropy = torch.distributions.Categorical(logits=logits.double()).entropy()
    return losses.detach(), grad, entropy


def through(logits, labels, w_hard, ids, probs, w_soft, dtype=torch.float32, **fields):
    """The chunk that `Mixed` makes of the logits."""
    mixed = Mixed(labels, fixed(w_hard, w_soft), ids, probs, **fields)
    return mixed(logits.clone(), slice(0, len(logits)), dtype)


@pytest.mark.parametrize("vocab", [1, 7, 4096, 5000, 9001])
def test_a_row_equals_the_oracle_at_any_width(form, vocab):
    given = problem(vocab=vocab)
    want, grad, entropy = oracle(*given)
    out = through(*given, entropy=True, norms=True)
    torch.testing.assert_close(out.loss_t.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.grad_tV.double(), grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out.parts["entropy"].double(), entropy, rtol=1e-4, atol=1e-5)
    q = torch.softmax(given[0].double(), -1)
    onehot = torch.nn.functional.one_hot(given[1], vocab)
    torch.testing.assert_close(out.parts["hard_norm"].double(), (q - onehot).norm(dim=-1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("atoms", [1, 2, 3, 33, 64])
def test_any_number_of_atoms(form, atoms):
    given = problem(atoms=atoms, vocab=500)
    want, grad, _ = oracle(*given)
    out = through(*given)
    torch.testing.assert_close(out.loss_t.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.grad_tV.double(), grad, rtol=1e-4, atol=1e-6)


def test_labels_alone(form):
    logits, labels, w_hard, *_ = problem()
    no_atoms = torch.zeros(5, 1, dtype=torch.int64)
    want, grad, _ = oracle(logits, labels, w_hard, no_atoms, torch.zeros(5, 1), torch.zeros(5))
    out = through(logits, labels, w_hard, None, None, None)
    torch.testing.assert_close(out.loss_t.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.grad_tV.double(), grad, rtol=1e-4, atol=1e-6)


def test_the_gradient_in_bf16_is_the_exact_one_rounded_and_takes_no_second_tensor(form):
    """The interpreter rounds towards 0, a GPU to the nearest; the torch form leaves rounding to the products."""
    given = problem(vocab=9001)
    logits = given[0].clone()
    _, grad, _ = oracle(*given)
    mixed = Mixed(given[1], fixed(given[2], given[5]), given[3], given[4])
    out = mixed(logits, slice(0, 5), torch.bfloat16)
    assert out.grad_tV.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
    assert out.grad_tV.dtype == (torch.bfloat16 if form == "triton" else torch.float32)
    torch.testing.assert_close(out.grad_tV.double(), grad, rtol=2**-7, atol=1e-8)


def test_huge_logits_stay_right(form):
    given = problem(scale=1e4)
    want, grad, entropy = oracle(*given)
    out = through(*given, entropy=True)
    torch.testing.assert_close(out.loss_t.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.grad_tV.double(), grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out.parts["entropy"].double(), entropy, rtol=1e-4, atol=1e-5)


def test_what_all_logits_of_a_row_have_in_common_costs_no_digits(form):
    """Their differences are exact; the log-sum-exp itself has steps of 1/16 there."""
    given = list(problem(vocab=5000))
    given[0] = (given[0] + 1e6).round()
    want, grad, _ = oracle(*given)
    out = through(*given, norms=True)
    torch.testing.assert_close(out.loss_t.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.grad_tV.double(), grad, rtol=1e-4, atol=1e-7)
    q = torch.softmax(given[0].double(), -1)
    onehot = torch.nn.functional.one_hot(given[1], 5000)
    torch.testing.assert_close(out.parts["hard_norm"].double(), (q - onehot).norm(dim=-1), rtol=1e-4, atol=1e-4)


def test_the_entropy_of_logits_whose_differences_overflow(form):
    given = problem(vocab=9001)
    low, high = -3.4e38, 3.4e38
    for logits, entropy in (([low, high], 0.0), ([high, low, high], math.log(2))):
        given[0][:] = low
        given[0][:, 0::4096][:, : len(logits)] = torch.tensor(logits)
        torch.testing.assert_close(through(*given, entropy=True).parts["entropy"], torch.full((5,), entropy))


@pytest.mark.parametrize("what", [math.nan, math.inf, -math.inf])
def test_a_masked_row_adds_exactly_nothing_whatever_it_holds(form, what):
    logits, labels, w_hard, ids, probs, w_soft = problem()
    clean = through(logits, labels, w_hard, ids, probs, w_soft)
    w_hard[1] = w_soft[1] = 0
    for place in (slice(None), slice(3, 4)):
        bad = logits.clone()
        bad[1, place] = what
        for dtype in (torch.float32, torch.bfloat16):
            out = through(bad, labels, w_hard, ids, probs, w_soft, dtype)
            assert out.loss_t[1] == 0 and not out.grad_tV[1].any()
        others = [0, 2, 3, 4]
        assert torch.equal(out.loss_t[others], clean.loss_t[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_in_a_row_that_counts_is_seen(form, dtype):
    logits, *rest = problem()
    logits[1, 17] = math.nan
    out = through(logits, *rest, dtype)
    assert out.loss_t[1].isnan() and out.grad_tV[1].isnan().any()
    assert out.loss_t[[0, 2, 3, 4]].isfinite().all() and out.grad_tV[[0, 2, 3, 4]].isfinite().all()


def test_padding_over_an_impossible_id_makes_no_nan(form):
    logits, labels, w_hard, ids, probs, w_soft = problem()
    ids[:, 4:] = 299
    labels[:], ids[:, :4] = labels % 299, ids[:, :4] % 299
    logits[:, 299] = -math.inf
    logits[0, :200] = -math.inf
    labels[0], ids[0, :4] = 250, 260
    out = through(logits, labels, w_hard, ids, probs, w_soft, entropy=True, norms=True)
    assert out.loss_t.isfinite().all() and out.grad_tV.isfinite().all()
    assert all(part.float().isfinite().all() for part in out.parts.values())
    want, grad, _ = oracle(logits.clamp(min=-1e4), labels, w_hard, ids, probs, w_soft)
    torch.testing.assert_close(out.loss_t.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.grad_tV.double(), grad, rtol=1e-4, atol=1e-6)


def test_a_term_of_weight_0_adds_nothing_where_it_is_infinite(form):
    logits, labels, w_hard, ids, probs, w_soft = problem()
    logits[:, labels[0]] = -math.inf
    w_hard[0], ids[0] = 0, (labels[0] + 1) % 300
    out = through(logits, labels, w_hard, ids, probs, w_soft)
    assert out.parts["hard"][0] == math.inf and out.loss_t[0].isfinite() and out.grad_tV[0].isfinite().all()


@pytest.mark.parametrize("wrong", [-100, -1, 300, 1 << 40])
@pytest.mark.parametrize("where", ["label", "atom"])
def test_a_kernel_reads_nothing_out_of_range(monkeypatch, where, wrong):
    """Such a row's loss is NaN, but for an atom that has no probability; guards beside the logits stay as they are."""
    pytest.importorskip("triton", reason="the extra `kernels` is not installed")
    monkeypatch.setattr(rows, "_fused", lambda *_: True)
    logits, labels, w_hard, ids, probs, w_soft = problem()
    guarded = torch.full((7, 300), 7.0)
    guarded[1:6] = logits
    (labels if where == "label" else ids)[0] = wrong
    probs[3], ids[3] = 0, wrong
    mixed = Mixed(labels, fixed(w_hard, w_soft), ids, probs)
    out = mixed(guarded[1:6], slice(0, 5), torch.float32)
    assert out.loss_t[0].isnan() and out.loss_t[1:].isfinite().all() and out.grad_tV[3].isfinite().all()
    assert (guarded[0] == 7).all() and (guarded[6] == 7).all()


def test_a_selection_between_the_passes_changes_nothing(form):
    given = problem(vocab=5000)
    plain = through(*given)
    seen = []
    out = through(*given, select=lambda part, logits, lse: seen.append((logits.clone(), lse)))
    assert torch.equal(seen[0][0], given[0])
    torch.testing.assert_close(seen[0][1], torch.logsumexp(given[0], -1))
    assert torch.equal(out.grad_tV, plain.grad_tV) and torch.equal(out.loss_t, plain.loss_t)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_the_whole_head_under_the_kernels_equals_that_in_torch(monkeypatch, dtype, rtol):
    pytest.importorskip("triton", reason="the extra `kernels` is not installed")
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(9, 8, generator=g), torch.randn(700, 8, generator=g)
    _, labels, w_hard, ids, probs, w_soft = problem(tokens=9, vocab=700)
    made = []
    for fused in (False, True):
        monkeypatch.setattr(rows, "_fused", lambda *_, fused=fused: fused)
        leaves = [x.clone().to(dtype).requires_grad_() for x in (hidden, weight)]
        out = head_loss(*leaves, Mixed(labels, fixed(w_hard, w_soft), ids, probs), chunk=4)
        made.append([out.loss_sum, *torch.autograd.grad(out.loss_sum, leaves), *out.parts.values()])
    for mine, other in zip(*made):
        torch.testing.assert_close(mine, other, rtol=rtol, atol=0.1 * rtol)


def test_the_kernels_compile_for_an_h100_and_no_lane_writes_before_all_have_read(tmp_path):
    pytest.importorskip("triton", reason="the extra `kernels` is not installed")
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.workers.row_compiled"]
    environment = kept | {"TRITON_CACHE_DIR": str(tmp_path)}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0 and "compiled" in found.stdout, found.stdout + found.stderr
