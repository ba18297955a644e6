"""Routing, experts and load balancing against a loop over tokens in fp64."""

import math

import pytest
import torch

from distill.model import Transformer, balance
from distill.model.router import Router
from tests.closeness import worst
from tests.unit.test_model_attention import config_of


def oracle_moe(block, hidden_TD, experts_TA):
    """shared(h) + sum of FFN_e(sigmoid(logit_e) h), one token and expert at a time."""
    h_TD = hidden_TD.double()
    shared = block.shared_expert
    gate, up, down = (getattr(shared, f"{n}_proj").weight.double() for n in ("gate", "up", "down"))
    silu = lambda x: x / (1 + torch.exp(-x))  # noqa: E731
    out_TD = (silu(h_TD @ gate.T) * (h_TD @ up.T)) @ down.T
    for t, experts in enumerate(experts_TA.tolist()):
        for e in experts:
            logit = float(h_TD[t] @ block.router.weight[e].detach().double())
            x = h_TD[t] / (1 + math.exp(-logit))
            both = x @ block.experts.gate_up_proj[e].double()
            F = both.shape[0] // 2
            out_TD[t] += (silu(both[:F]) * both[F:]) @ block.experts.down_proj[e].double()
    return out_TD


@pytest.mark.parametrize("active", [1, 2, 4])
@pytest.mark.parametrize("biased", [False, True])
def test_moe_equals_the_loop(active, biased):
    torch.manual_seed(0)
    block = Transformer(config_of(active_experts=active)).layers[1].feed_forward
    hidden_TD = torch.randn(19, 32)
    if biased:
        block.router.bias.copy_(torch.tensor([0.5, -0.5, 0.25, 0.0]))
    out_TD, (logits_TE, _, counts_E) = block(hidden_TD)
    key_TE = logits_TE.double().sigmoid() + block.router.bias
    experts_TA = key_TE.argsort(dim=1, descending=True)[:, :active]
    assert worst(out_TD, oracle_moe(block, hidden_TD, experts_TA)) < 1e-5
    counts = [sum(e in row for row in experts_TA.tolist()) for e in range(4)]
    assert counts_E.tolist() == counts


def router_of(rows):
    """A router whose logits for the e-th unit vector are column e of `rows`."""
    router = Router(len(rows[0]), len(rows), 1)
    with torch.no_grad():
        router.weight.copy_(torch.tensor(rows))
    return router


def test_zero_bias_selects_by_logit_where_the_sigmoid_ties():
    router = router_of([[30.0, 40.0], [40.0, 30.0]])  # both sigmoids are exactly 1 in fp32
    assert router(torch.eye(2))[1].tolist() == [[1], [0]]


def test_bias_moves_the_selection_and_never_the_weight():
    router = router_of([[1.0], [0.5]])
    _, experts, weight = router(torch.ones(1, 1))
    assert experts.tolist() == [[0]] and weight.item() == pytest.approx(1 / (1 + math.exp(-1.0)))
    router.bias.copy_(torch.tensor([-0.2, 0.2]))
    _, experts, weight = router(torch.ones(1, 1))
    assert experts.tolist() == [[1]] and weight.item() == pytest.approx(1 / (1 + math.exp(-0.5)))
    router.bias.copy_(torch.tensor([-0.01, 0.01]))  # less than the sigmoids' difference, 0.109
    assert router(torch.ones(1, 1))[1].tolist() == [[0]]


def test_router_bias_is_an_fp32_buffer_in_any_precision():
    model = Transformer(config_of())
    model.routers[0].bias += 0.001
    model.to(torch.bfloat16)
    assert model.routers[0].weight.dtype == torch.bfloat16
    assert model.routers[0].bias.dtype == torch.float32
    assert torch.equal(model.routers[0].bias, torch.full((4,), 0.001))
    assert "layers.1.feed_forward.router.bias" in model.state_dict()
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())
    model.logits(torch.zeros(1, 9, dtype=torch.int64))


@pytest.mark.parametrize("tokens", [1, 40])
def test_every_parameter_gets_a_gradient_with_empty_experts(tokens):
    torch.manual_seed(0)
    model = Transformer(config_of())
    for router in model.routers:
        router.bias.copy_(torch.tensor([9.0, 0, 0, 0]))  # everything to expert 0
    out, routing = model(torch.randint(0, 64, (1, tokens)), head_fn=lambda h, w: (h @ w.T).square().mean())
    assert routing.counts_LE.tolist() == [[tokens, 0, 0, 0]] * 2
    out.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    experts = model.layers[1].feed_forward.experts
    for parameter in experts.parameters():
        assert (parameter.grad[1:] == 0).all() and (parameter.grad[0] != 0).any()


def test_routing_counts_follow_the_logits():
    torch.manual_seed(0)
    model = Transformer(config_of(active_experts=2, moe_step=1))
    _, routing = model(torch.randint(0, 64, (2, 15)))
    assert routing.counts_LE.dtype == torch.int64 and routing.counts_LE.shape == (4, 4)
    for logits_TE, counts_E in zip(routing.logits_LTE, routing.counts_LE):
        chosen = [e for row in logits_TE.tolist() for e in sorted(range(4), key=lambda e: -row[e])[:2]]
        assert counts_E.tolist() == [chosen.count(e) for e in range(4)]
        assert logits_TE.requires_grad


# ---------------------------------------------------------------- balancing


def test_update_bias_is_the_published_step():
    model = Transformer(config_of())
    balance.update_bias(model, torch.tensor([[8, 0, 2, 2], [3, 3, 3, 3]]), rate=0.01)
    # mean 3: signs -1, +1, +1, +1; their mean, 0.5, is taken off.
    torch.testing.assert_close(model.routers[0].bias, torch.tensor([-0.015, 0.005, 0.005, 0.005]))
    assert not model.routers[1].bias.any()


def test_update_bias_evens_the_load():
    torch.manual_seed(0)
    model = Transformer(config_of(experts=8))
    ids_BS = torch.randint(0, 64, (4, 64))
    with torch.no_grad():
        first = model(ids_BS)[1].counts_LE
        for _ in range(60):
            balance.update_bias(model, model(ids_BS)[1].counts_LE, rate=0.02)
        last = model(ids_BS)[1].counts_LE
    assert (last.amax(1) < 0.6 * first.amax(1)).all()
    before, after = balance.load_stats(first), balance.load_stats(last)
    assert after["expert_entropy"] > before["expert_entropy"] and after["expert_max_load"] < before["expert_max_load"]


def test_load_stats_by_hand():
    stats = balance.load_stats(torch.tensor([[4, 4, 0, 0], [2, 2, 2, 2]]))
    assert stats["expert_entropy"].item() == pytest.approx((0.5 + 1.0) / 2)
    assert stats["expert_max_load"].item() == 2.0 and stats["dead_experts"].item() == 2.0
    assert balance.load_stats(torch.zeros(0, 4, dtype=torch.int64)) == {}
