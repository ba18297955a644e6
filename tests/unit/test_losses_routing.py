"""Routing penalties against hand-worked values and fp64 loops."""

import math

import pytest
import torch

from losses.routing import routing_loss, sequence_balance, z_loss
from tests.closeness import worst


def test_balance_is_one_when_even_and_experts_over_active_at_worst():
    experts = 4
    even_TE = torch.full((8, experts), -20.0).scatter_(1, torch.arange(8)[:, None] % experts, 20.0)
    even_TA = even_TE.topk(1).indices
    assert sequence_balance(even_TE, even_TA, 2).tolist() == pytest.approx([1.0, 1.0], abs=1e-6)
    one_TE = torch.full((8, experts), -30.0)
    one_TE[:, 2] = 30.0
    assert sequence_balance(one_TE, one_TE.topk(1).indices, 1).item() == pytest.approx(4.0, abs=1e-6)
    # Each sequence for itself: two that are each uneven do not even out.
    halves_TE = torch.cat([one_TE, one_TE.roll(1, 1)])
    assert sequence_balance(halves_TE, halves_TE.topk(1).indices, 2).tolist() == pytest.approx([4.0, 4.0], abs=1e-6)


def test_z_loss_by_hand():
    logits_TE = torch.tensor([[0.0, 0.0], [math.log(3.0), -1e9]])
    assert z_loss(logits_TE).tolist() == pytest.approx([math.log(2.0) ** 2, math.log(3.0) ** 2])


@pytest.mark.parametrize("active", [1, 2])
def test_sum_and_gradient_equal_a_loop(active):
    g = torch.Generator().manual_seed(active)
    rows, length, experts = 3, 5, 6
    valid_BS = torch.rand(rows, length, generator=g) < 0.7
    leaves = [torch.randn(rows * length, experts, generator=g).requires_grad_() for _ in range(2)]
    chosen = [x.topk(active).indices for x in leaves]
    total, parts = routing_loss(leaves, chosen, valid_BS, balance=0.2, z=0.05)
    total.backward()

    twins = [x.detach().double().requires_grad_() for x in leaves]
    balance, z = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for x, picks in zip(twins, chosen):
        for b in range(rows):
            tokens = range(b * length, (b + 1) * length)
            for e in range(experts):
                hits = sum(e in picks[t].tolist() for t in tokens)
                mean = sum((1 / (1 + (-x[t, e]).exp())) / (1 / (1 + (-x[t]).exp())).sum() for t in tokens) / length
                balance = balance + valid_BS[b].sum() * (hits * experts / (active * length)) * mean
        for t in range(rows * length):
            if valid_BS.flatten()[t]:
                z = z + x[t].exp().sum().log() ** 2
    (0.2 * balance + 0.05 * z).backward()
    assert total.item() == pytest.approx((0.2 * balance + 0.05 * z).item(), rel=1e-5)
    assert parts["balance_loss"].item() == pytest.approx(balance.item() / 2, rel=1e-5)
    assert parts["z_loss"].item() == pytest.approx(z.item() / 2, rel=1e-5)
    for ours, twin in zip(leaves, twins):
        assert worst(ours.grad, twin.grad) < 1e-5


def test_vanishing_scores_and_dense_models_give_finite_sums():
    logits_TE = torch.full((4, 3), -200.0, requires_grad=True)
    total, _ = routing_loss([logits_TE], [logits_TE.topk(1).indices], torch.ones(2, 2).bool(), balance=1.0, z=0.0)
    total.backward()
    assert torch.isfinite(total) and torch.isfinite(logits_TE.grad).all()
    assert routing_loss([], [], torch.ones(2, 2).bool(), balance=1.0, z=1.0)[0] == 0
