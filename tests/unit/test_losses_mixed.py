"""The fused loss against a dense fp64 oracle that builds the whole target, and against finite differences."""

import pytest
import torch

from losses import mixed_loss

T, D, V, K = 13, 6, 29, 5


def problem(seed=0, dtype=torch.float64, mass=True):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, generator=g, dtype=torch.float64)
    weight = torch.randn(V, D, generator=g, dtype=torch.float64)
    labels = torch.randint(V, (T,), generator=g)
    ids = torch.stack([torch.randperm(V, generator=g)[:K] for _ in range(T)])
    probs = torch.rand(T, K, generator=g, dtype=torch.float64)
    if not mass:  # rows whose mass is exactly 1
        probs = probs / probs.sum(-1, keepdim=True)
    probs[3] = 0  # a token without targets
    w_hard = torch.rand(T, generator=g, dtype=torch.float64)
    w_soft = torch.rand(T, generator=g, dtype=torch.float64)
    w_hard[5] = w_soft[5] = 0  # an invalid token
    return [x.to(dtype) if x.is_floating_point() else x for x in (hidden, weight, labels, w_hard, ids, probs, w_soft)]


def oracle(hidden, weight, labels, w_hard, ids, probs, w_soft):
    """-sum_v m_v log softmax(z)_v with a dense m, token by token."""
    total = hidden.new_zeros(())
    logp = torch.log_softmax(hidden @ weight.T, -1)
    for t in range(hidden.shape[0]):
        target = torch.zeros(V, dtype=hidden.dtype)
        target[labels[t]] += w_hard[t]
        for k in range(ids.shape[1]):
            target[ids[t, k]] += w_soft[t] * probs[t, k]
        total = total - (target * logp[t]).sum()
    return total


@pytest.mark.parametrize("chunk", [1, 4, 13, 64])
@pytest.mark.parametrize("mass", [True, False])
def test_value_and_gradients_equal_dense_oracle(chunk, mass):
    hidden, weight, *rest = problem(mass=mass)
    a = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    b = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss = mixed_loss(*a, *rest, chunk=chunk).loss_sum
    want = oracle(*b, *rest)
    (3.0 * loss).backward()
    (3.0 * want).backward()
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-12)
    for x, y in zip(a, b):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-11, atol=1e-12)


def test_gradients_equal_finite_differences():
    hidden, weight, *rest = problem(seed=1)
    assert torch.autograd.gradcheck(
        lambda h, w: mixed_loss(h, w, *rest, chunk=5).loss_sum, (hidden.requires_grad_(), weight.requires_grad_())
    )


def test_duplicate_and_label_ids_count_twice():
    hidden, weight, labels, w_hard, ids, probs, w_soft = problem(seed=2)
    ids[:, 1] = ids[:, 0]
    ids[:, 2] = labels
    args = (labels, w_hard, ids, probs, w_soft)
    torch.testing.assert_close(mixed_loss(hidden, weight, *args).loss_sum, oracle(hidden, weight, *args))


def test_without_targets_it_is_cross_entropy():
    hidden, weight, labels, *_ = problem(dtype=torch.float32)
    hidden.requires_grad_()
    out = mixed_loss(hidden, weight, labels, torch.ones(T))
    want_T = torch.nn.functional.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="none")
    torch.testing.assert_close(out.hard_T.double(), want_T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.loss_sum.double(), want_T.sum(), rtol=1e-5, atol=1e-5)
    assert out.soft_T is out.mass_T is out.agree_T is None


def test_masked_rows_have_zero_gradient_and_parts_are_unweighted():
    hidden, weight, *rest = problem()
    hidden.requires_grad_()
    out = mixed_loss(hidden, weight, *rest)
    out.loss_sum.backward()
    assert not hidden.grad[5].any() and hidden.grad[4].any()
    labels, _, ids, probs, _ = rest
    logp = torch.log_softmax(hidden @ weight.T, -1)
    torch.testing.assert_close(out.hard_T, -logp[torch.arange(T), labels].detach())
    torch.testing.assert_close(out.soft_T, -(probs * logp.gather(-1, ids)).sum(-1).detach())
    torch.testing.assert_close(out.mass_T, probs.sum(-1))
    best = ids[torch.arange(T), probs.argmax(-1)]
    assert out.agree_T.tolist() == ((logp.argmax(-1) == best) & (probs.sum(-1) > 0)).tolist()


def test_all_masked_batch_and_extreme_logits_stay_finite():
    hidden, weight, labels, w_hard, ids, probs, w_soft = problem(dtype=torch.float32)
    hidden, zero = (hidden * 1e4).requires_grad_(), torch.zeros(T)
    out = mixed_loss(hidden, weight, labels, zero, ids, probs, zero)
    out.loss_sum.backward()
    assert out.loss_sum == 0 and not hidden.grad.any()
    loud = mixed_loss(hidden, weight, labels, w_hard, ids, probs, w_soft)
    assert torch.isfinite(loud.loss_sum) and torch.isfinite(loud.hard_T).all()


def test_bf16_input_keeps_fp32_loss():
    hidden, weight, *rest = problem(dtype=torch.bfloat16)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    out = mixed_loss(hidden, weight, *rest)
    out.loss_sum.backward()
    want = oracle(
        hidden.detach().double(), weight.detach().double(), *[r.double() if r.is_floating_point() else r for r in rest]
    )
    assert out.loss_sum.dtype == torch.float32 and hidden.grad.dtype == torch.bfloat16
    torch.testing.assert_close(out.loss_sum.double(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("training", [True, False])
def test_a_selection_sees_the_logits_of_every_token_once_and_changes_nothing(training):
    hidden, weight, *rest = problem()
    hidden.requires_grad_(), weight.requires_grad_()
    plain = mixed_loss(hidden, weight, *rest, chunk=5)

    def select(rows, logits, lse):
        return rows.start, logits.clone(), lse.clone()

    with torch.set_grad_enabled(training):
        out = mixed_loss(hidden, weight, *rest, chunk=5, select=select)
    assert [s for s, *_ in out.selected] == [0, 5, 10]
    want = (hidden @ weight.T).detach()
    torch.testing.assert_close(torch.cat([logits for _, logits, _ in out.selected]), want)
    torch.testing.assert_close(torch.cat([lse for *_, lse in out.selected]), want.logsumexp(-1))
    assert all(map(torch.equal, out[:-1], plain[:-1]))
    if training:
        grads = [torch.autograd.grad(x.loss_sum, (hidden, weight)) for x in (out, plain)]
        assert all(map(torch.equal, *grads))


def test_large_vocabulary_ids():
    hidden, labels = torch.randn(3, 4), torch.tensor([0, 202047, 131073])
    weight = torch.randn(202048, 4)
    ids, probs = torch.tensor([[202047, 5], [131072, 131073], [0, 1]]), torch.full((3, 2), 0.5)
    out = mixed_loss(hidden, weight, labels, torch.full((3,), 0.25), ids, probs, torch.full((3,), 0.75))
    logp = torch.log_softmax(hidden.double() @ weight.double().T, -1)
    want = -0.25 * logp[torch.arange(3), labels] - 0.75 * (probs * logp.gather(-1, ids)).sum(-1)
    torch.testing.assert_close(out.loss_sum.double(), want.sum(), rtol=1e-5, atol=1e-5)
