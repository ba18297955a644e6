"""Transfer against a model with the published multipliers in its forward pass, trained by a plain Adam in fp64."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from distill.config.schema import BaseSizes, ModelConfig, OptimConfig, Parametrization, WeightDecay
from distill.engine import optim
from distill.model import Transformer, hf
from distill.model.parametrization import Scales, scales
from distill.run.models import load_model
from tests.bench import coordcheck

BASE = BaseSizes(hidden_size=8, layers=2, expert_hidden=8, dense_hidden=8)
# No positions, no chunks: the reference below has none. The dense layers' width grows faster than the model's (8 to 4),
# the experts' slower (2 to 4).
CONFIG = ModelConfig(
    vocab_size=32, hidden_size=32, layers=4, heads=8, kv_heads=4, head_dim=4, expert_hidden=16, dense_hidden=64,
    experts=4, moe_step=2, nope_step=1, chunk_size=None, temperature_tuning=False, init_std=0.2,
    parametrization=Parametrization.transfer, base=BASE,
)  # fmt: skip
N, L, EXPERT, DENSE = 4.0, 2.0, 2.0, 8.0
"""The ratios of CONFIG to BASE."""


def variant(**changes):
    return dataclasses.replace(CONFIG, **changes)


def reference_table(name):
    """By hand, of W = multiplier * theta: multiplier, std of theta, size of theta's gradient; all over the base's."""
    hidden = EXPERT if "expert" in name else DENSE
    if name == "embed.weight":
        return 1, 1, 1 / N
    if name == "head.weight":
        return 1 / N, 1, 1 / N
    if name == "norm.weight":
        return 1, None, 1 / N
    if "layernorm" in name:
        return 1, None, 1 / (N * L)
    if "router" in name:
        return 1 / N, N**0.5, 1 / (N * L)
    if "o_proj" in name:
        return 1 / (N * L), N**0.5, 1 / (N * N * L)
    if "down_proj" in name:
        std = {EXPERT: EXPERT**0.5, DENSE: N**0.5}[hidden]  # fan-in, and mean-field
        return 1 / (hidden * L), std, 1 / (N * hidden * L)
    if "gate" in name or "up_proj" in name:
        return 1 / N, N**0.5, 1 / (N * hidden * L)
    return 1 / N, N**0.5, 1 / (N * N * L)  # q, k, v


def reference_logits(theta, ids_BS):
    """A small Llama 4 without positions: every product is with theta, and its multiplier comes after it."""

    def times(x, name):
        return reference_table(name)[0] * (x @ theta[name].T)

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * theta[name]

    def mlp(x, prefix):
        return times(
            F.silu(times(x, f"{prefix}.gate_proj.weight")) * times(x, f"{prefix}.up_proj.weight"),
            f"{prefix}.down_proj.weight",
        )

    batch, length = ids_BS.shape
    x = theta["embed.weight"][ids_BS]
    for layer in range(4):
        at = f"layers.{layer}"
        h = norm(x, f"{at}.input_layernorm.weight")
        q, k, v = (
            times(h, f"{at}.self_attn.{n}_proj.weight").view(batch, length, -1, 4).transpose(1, 2) for n in "qkv"
        )
        scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) / math.sqrt(4)
        scores = scores + torch.full((length, length), -math.inf).triu(1)
        mixed = (scores.softmax(-1) @ v.repeat_interleave(2, 1)).transpose(1, 2).reshape(batch, length, 32)
        x = x + times(mixed, f"{at}.self_attn.o_proj.weight")
        h = norm(x, f"{at}.post_attention_layernorm.weight")
        at = f"{at}.feed_forward"
        if layer % 2 == 0:
            x = x + mlp(h, at)
            continue
        router = times(h, f"{at}.router.weight")
        into, out = f"{at}.experts.gate_up_proj", f"{at}.experts.down_proj"
        routed = torch.zeros_like(h)
        for expert in range(4):
            scaled = h * router[..., expert].sigmoid()[..., None]
            gate, up = (reference_table(into)[0] * (scaled @ theta[into][expert])).chunk(2, -1)
            y = reference_table(out)[0] * ((F.silu(gate) * up) @ theta[out][expert])
            routed = torch.where((router.argmax(-1) == expert)[..., None], y, routed)
        x = x + mlp(h, f"{at}.shared_expert") + routed
    return times(norm(x, "norm.weight"), "head.weight")


def batch(step):
    return torch.randint(0, 32, (4, 9), generator=torch.Generator().manual_seed(step))


def loss_of(logits_BSV, ids_BS):
    return F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), ids_BS[:, 1:].flatten())


def test_absorbed_multipliers_train_as_those_in_the_forward_pass():
    """The same function, the same weights up to their multiplier, step for step; one learning rate for all of theta."""
    # An eps of the gradients' size, so that its factors count.
    lr, eps, decay, steps = 0.01, 1e-3, 0.1, 6
    torch.manual_seed(3)
    model = Transformer(CONFIG)
    torch.manual_seed(3)
    theta = {
        name: torch.ones(p.shape).double()
        if p.ndim == 1
        else torch.randn(p.shape).double() * 0.2 * reference_table(name)[1]
        for name, p in model.named_parameters()
    }
    decays = WeightDecay(matrices=decay, embedding=decay, head=decay, router=decay, norms=decay)
    optimizer = optim.build(model, OptimConfig(lr=lr, eps=eps, weight_decay=decays))
    moments = {name: [torch.zeros_like(t), torch.zeros_like(t)] for name, t in theta.items()}
    for step in range(1, steps + 1):
        ids_BS = batch(step)
        loss = loss_of(model.logits(ids_BS), ids_BS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        theta = {name: t.detach().requires_grad_() for name, t in theta.items()}
        want = loss_of(reference_logits(theta, ids_BS), ids_BS)
        want.backward()
        assert loss.item() == pytest.approx(want.item(), rel=2e-6), step
        with torch.no_grad():
            for name, t in theta.items():
                first, second = moments[name]
                first.mul_(0.9).add_(t.grad, alpha=0.1)
                second.mul_(0.95).addcmul_(t.grad, t.grad, value=0.05)
                unbiased, size = first / (1 - 0.9**step), (second / (1 - 0.95**step)).sqrt()
                t.mul_(1 - lr * decay)
                t.sub_(lr * unbiased / (size + eps * reference_table(name)[2]))
    for name, parameter in model.named_parameters():
        multiplier = reference_table(name)[0]
        torch.testing.assert_close(
            parameter.double(), multiplier * theta[name].detach(), rtol=1e-4, atol=2e-6 * multiplier
        )


def at_base(**changes):
    sizes = dict(hidden_size=8, heads=2, kv_heads=1, layers=2, expert_hidden=8, dense_hidden=8)
    return variant(**sizes, **changes)


def test_factors_are_one_at_the_base_and_under_standard():
    for config in (at_base(), variant(parametrization=Parametrization.standard)):
        assert {scales(config, name) for name, _ in Transformer(config).named_parameters()} == {Scales(1, 1, 1, 1)}


def test_standard_weights_are_bitwise_those_of_one_std():
    torch.manual_seed(4)
    model = Transformer(variant(parametrization=Parametrization.standard))
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            assert torch.equal(parameter, torch.empty_like(parameter).normal_(std=0.2)), name
    (group,) = optim.build(model, OptimConfig(weight_decay=WeightDecay(0.1, 0.1, 0.1, 0.1, 0.1))).param_groups
    assert (group["lr_factor"], group["eps"], group["weight_decay"]) == (1, 1e-8, 0.1)


def test_images_enter_like_the_embedding_and_the_tower_stays_as_it_is():
    assert scales(CONFIG, "multi_modal_projector.linear_1.weight") == scales(CONFIG, "embed.weight") == (1, 1, 1 / N, 1)
    assert scales(CONFIG, "vision_model.model.layers.0.mlp.fc1.weight") == (1, 1, 1, 1)


def test_every_parameter_is_in_one_group_with_its_factors():
    model = Transformer(CONFIG)
    config = OptimConfig(lr=0.5, eps=1e-6, weight_decay=WeightDecay(matrices=0.1, head=0.3))
    optimizer = optim.build(model, config)
    optim.set_learning_rate(optimizer, 0.25)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(groups) == sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        group, factors = groups[id(parameter)], scales(CONFIG, name)
        decay = getattr(config.weight_decay, optim.decay_group(name))
        want = (0.25 * factors.lr, 1e-6 * factors.eps, decay * factors.weight_decay)
        assert (group["lr"], group["eps"], group["weight_decay"]) == pytest.approx(want, rel=1e-12), name


def test_weights_from_a_folder_learn_by_the_rules_of_the_run(tmp_path):
    hf.save(Transformer(variant(chunk_size=8, parametrization=Parametrization.standard)), tmp_path / "model")
    model = load_model(tmp_path / "model", "teacher", variant(chunk_size=8))
    assert scales(model.config, "head.weight") == scales(CONFIG, "head.weight") == (1 / N, 1 / N, 1, N)


WIDE = dict(hidden_size=256, heads=32, kv_heads=16)


@pytest.mark.parametrize(
    ("changes", "attention", "feed_forward"),
    [
        (dict(**WIDE, expert_hidden=256, dense_hidden=256), 0, 0),
        (WIDE, 0, 0),  # experts that stay small beside the width
        (dict(expert_hidden=256, dense_hidden=256), 0, -0.5),  # mean-field: what has not been learned fades
        (dict(layers=16), -1, -1),  # eight times as many layers add an eighth each
    ],
)
def test_initial_outputs_follow_the_sizes(changes, attention, feed_forward):
    base = variant(
        hidden_size=32, heads=4, kv_heads=2, head_dim=8, layers=2, expert_hidden=32, dense_hidden=32,
        base=BaseSizes(hidden_size=32, layers=2, expert_hidden=32, dense_hidden=32),
    )  # fmt: skip

    def sizes(config):
        """Embedding, attention, feed-forward: log RMS of the outputs."""
        torch.manual_seed(6)
        model, found = Transformer(config), {}

        def hook(module, args, out):
            kind = type(module).__name__.replace("MoE", "SwiGLU")
            found.setdefault(kind, []).append(out[0] if isinstance(out, tuple) else out)

        for module in (model.embed, *(m for layer in model.layers for m in (layer.self_attn, layer.feed_forward))):
            module.register_forward_hook(hook)
        with torch.no_grad():
            model(torch.randint(0, 32, (8, 32)))
        return [torch.cat(outs).square().mean().log().item() / 2 for outs in found.values()]

    slopes = [(b - a) / math.log(8) for a, b in zip(sizes(base), sizes(dataclasses.replace(base, **changes)))]
    assert slopes == pytest.approx([0, attention, feed_forward], abs=0.12)


def test_coordinate_check_tells_the_two_apart():
    widths, worst = (64, 256), {}
    for p in Parametrization:
        found = coordcheck.sweep([coordcheck.config(p, width) for width in widths], seeds=3, steps=2)
        worst[p] = coordcheck.worst(coordcheck.slopes(found, widths))
    assert worst[Parametrization.transfer] < 0.2 and worst[Parametrization.standard] > 1.0
