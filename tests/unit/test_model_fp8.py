"""FP8 products: forward and backward against torch's own scaled products, and what H100 demands on every device."""

import dataclasses
import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from distill.config.errors import ConfigError
from distill.config.schema import PrecisionConfig
from distill.model import Transformer, casts, fp8, linear, scaled
from distill.model.dispatch import LocalDispatcher, filled
from distill.model.fp8 import Fp8
from distill.model.fp8_format import E4M3, E5M2
from distill.model.parts import PLAIN, Parts
from tests.closeness import worst
from tests.rehearsal.card import register_guard
from tests.unit.test_model_attention import config_of

RECIPES = [(whole, high) for whole in (False, True) for high in (True, False)]
ENDS = torch.tensor([16, 16, 64, 96], dtype=torch.int32)


def operands(*shape):
    """Numbers of bf16, as fp32 so that no result is rounded."""
    return torch.randn(shape).bfloat16().float().requires_grad_()


def oracle(a, b, whole=False, first=E4M3):
    """a b^T by torch's scaled product on a CPU, which takes any layout and has its own arithmetic."""

    def quantized(x, dtype):
        largest = x.abs().amax() if whole else x.abs().amax(1, keepdim=True)
        exponent = torch.frexp(largest.double() / torch.finfo(dtype).max)
        scale = torch.exp2(exponent.exponent - (exponent.mantissa == 0.5).int()).float()
        return (x / scale).to(dtype), scale

    (a8, scale_a), (b8, scale_b) = quantized(a.detach(), first), quantized(b.detach(), E4M3)
    return torch._scaled_mm(a8, b8.T, scale_a, scale_b if whole else scale_b.T, out_dtype=torch.float32)


@pytest.mark.parametrize(("whole", "high"), RECIPES)
def test_a_linear_layer_has_the_bits_of_scaled_products(whole, high):
    x, weight = operands(2, 24, 64), operands(48, 64)
    y = Fp8(whole, high).linear(x, weight)
    g = torch.randn_like(y).bfloat16().float()
    y.backward(g)
    x2, g2 = x.flatten(0, 1), g.flatten(0, 1)
    gradient = E5M2 if whole else E4M3
    assert torch.equal(y.flatten(0, 1), oracle(x2, weight, whole))
    assert torch.equal(x.grad.flatten(0, 1), oracle(g2, weight.T, whole, gradient))
    assert torch.equal(weight.grad, g2.T @ x2 if high else oracle(g2.T, x2.T, whole, gradient))
    assert 0.02 < worst(y, F.linear(x, weight)) < 0.2


@pytest.mark.parametrize(("whole", "high"), RECIPES)
def test_experts_have_the_bits_of_a_scaled_product_each_and_one_without_rows_no_gradient(whole, high):
    x, weight = operands(96, 32), operands(4, 32, 48)
    y = Fp8(whole, high).grouped(x, weight, ENDS)
    g = torch.randn_like(y).bfloat16().float()
    y.backward(g)
    for e, (start, end) in enumerate(zip([0, *ENDS.tolist()], ENDS.tolist())):
        rows, gs = x[start:end].detach(), g[start:end]
        if start == end:
            assert not weight.grad[e].any()
            continue
        assert torch.equal(y[start:end], oracle(rows, weight[e].T))
        assert torch.equal(x.grad[start:end], oracle(gs, weight[e]))
        assert torch.equal(weight.grad[e], rows.T @ gs if high else oracle(rows.T, gs.T))


@pytest.mark.parametrize("high", [True, False])
def test_a_linear_layer_has_the_bits_of_torchao(high):
    config = pytest.importorskip("torchao.float8.config")
    from torchao.float8.float8_linear import Float8Linear

    recipe = config.Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp" if high else "rowwise")
    x, weight = (operands(*shape).detach().bfloat16().requires_grad_() for shape in ((80, 64), (48, 64)))
    plain = torch.nn.Linear(64, 48, bias=False, dtype=torch.bfloat16)
    plain.weight.data.copy_(weight)
    theirs = Float8Linear.from_float(plain, config=dataclasses.replace(recipe, emulate=True))
    y = Fp8(False, high).linear(x, weight)
    g = torch.randn_like(y)
    y.backward(g)
    x2 = x.detach().clone().requires_grad_()
    expected = theirs(x2)
    expected.backward(g)
    assert torch.equal(y, expected) and torch.equal(x.grad, x2.grad)
    assert worst(weight.grad, theirs.weight.grad) < 1e-2 if high else torch.equal(weight.grad, theirs.weight.grad)


# ---------------------------------------------------------------- casts of weights


def test_weights_are_cast_once_a_step_and_a_shared_input_once(monkeypatch):
    made = []
    for name in ("rows", "columns"):
        real = getattr(fp8, name)
        counted = lambda x, *rest, name=name, real=real: made.append((name, x.shape)) or real(x, *rest)  # noqa: E731
        monkeypatch.setattr(fp8, name, counted)
    product = Fp8(False, True)
    layer = linear.SwiGLU(32, 48, product.linear)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)

    def step():
        made.clear()
        with torch.inference_mode():
            layer(torch.randn(5, 32))  # held-out text between steps
        for _ in range(3):
            layer(torch.randn(4, 32, requires_grad=True)).square().sum().backward()
        weights = [(name, shape) for name, shape in made if shape in ((48, 32), (32, 48))]
        inputs = [(name, shape) for name, shape in made if shape == (4, 32)]
        return sorted(weights), len(inputs)

    once = sorted((kind, shape) for kind in ("rows", "columns") for shape in ((48, 32), (48, 32), (32, 48)))
    # Going forward gate and up share theirs; going back the gradient of down's result is one of that shape.
    assert step() == (once, 6)
    assert step() == ([], 6)
    before = layer(torch.ones(1, 32))
    optimizer.step()
    assert step() == (once, 6)
    assert not torch.equal(before, layer(torch.ones(1, 32)))
    torch.autograd.graph.increment_version([*layer.parameters()])
    assert step() == (once, 6)


def test_casts_go_with_their_weights():
    product = Fp8(False, True)
    layer = linear.Linear(32, 16, product.linear)
    torch.nn.init.ones_(layer.weight)
    layer(torch.ones(2, 32))
    assert len(product.weights._of) == 1
    assert torch.equal(layer.double()(torch.ones(2, 32)), torch.full((2, 16), 32.0))
    del layer
    assert len(product.weights._of) == 0


@torch.inference_mode()
def test_weights_made_in_inference_mode_are_cast_as_they_are_at_the_moment():
    product = Fp8(False, True)
    x, weight, experts = torch.randn(96, 32), torch.randn(48, 32), torch.randn(4, 32, 48)
    for _ in range(2):
        assert torch.equal(product.linear(x, weight), oracle(x.bfloat16().float(), weight.bfloat16().float()))
        first = product.grouped(x, experts, ENDS)
        experts.mul_(2)
        assert torch.equal(product.grouped(x, experts, ENDS), 2 * first)
        weight.copy_(torch.randn(48, 32))


# ---------------------------------------------------------------- what the hardware demands


@pytest.mark.parametrize("public", [True, False])
@pytest.mark.parametrize(("whole", "high"), RECIPES)
def test_the_calls_on_a_gpu_are_ones_that_torch_accepts_there(monkeypatch, whole, high, public):
    """Forms for fake tensors check what the device does: layouts, multiples, scales, dtypes."""
    monkeypatch.setattr(scaled, "PUBLIC", public)
    calls = []
    for place, name in ((torch, "_scaled_mm"), (torch, "_scaled_grouped_mm"), (F, "scaled_mm")):
        real = getattr(place, name)
        counted = lambda *a, name=name, real=real, **k: calls.append(name) or real(*a, **k)  # noqa: E731
        monkeypatch.setattr(place, name, counted)
    product = Fp8(whole, high)
    register_guard()
    with FakeTensorMode(), torch.device("cuda"):
        for ends, shapes in ((None, ((37, 64), (48, 64))), (torch.empty(4).int(), ((96, 32), (4, 32, 48)))):
            x, weight = (torch.empty(shape, dtype=torch.bfloat16) for shape in shapes)
            y = product.linear(x, weight) if ends is None else product.grouped(x, weight, ends)
            # A build without CUDA has no autograd there.
            context = SimpleNamespace(
                saved_tensors=(x, weight, ends), fp8=product, weight=weight, needs_input_grad=(True, True)
            )
            gx, gw, *_ = fp8._Product.backward.__wrapped__(context, torch.empty_like(y))
            for found, like in ((gx, x), (gw, weight)):
                assert (found.shape, found.dtype, found.device.type) == (like.shape, torch.bfloat16, "cuda")
    products = 2 if high else 3
    assert calls == ["scaled_mm" if public else "_scaled_mm"] * products + ["_scaled_grouped_mm"] * products


def test_the_public_grouped_product_takes_what_it_is_given(monkeypatch):
    """It has no form for fake tensors; the call's arguments are its own."""
    seen = {}
    monkeypatch.setattr(scaled, "PUBLIC", True)
    signature = inspect.signature(F.scaled_grouped_mm)
    monkeypatch.setattr(F, "scaled_grouped_mm", lambda *a, **k: seen.update(signature.bind(*a, **k).arguments))
    a, b = casts.rows(torch.randn(96, 32)), casts.columns(torch.randn(4, 32, 48))
    scaled.scaled_grouped_mm(a, b, ENDS)
    assert seen["mat_b"].stride() == (48 * 32, 1, 32) and seen["offs"] is ENDS and seen["use_fast_accum"]
    assert seen["scale_a"].shape == (96,) and seen["scale_b"].shape == (4, 48)
    groups = [casts.columns_of_groups(torch.randn(96, width), ENDS) for width in (32, 48)]
    scaled.scaled_grouped_mm(*groups, ENDS)
    assert seen["scale_a"].shape == (4 * 32,) and seen["scale_b"].shape == (4 * 48,)


def test_public_names_are_those_of_the_version_from_which_they_are_used():
    assert (tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) >= (2, 13)) == scaled.PUBLIC


@pytest.mark.parametrize(("x", "weight"), [((16, 24), (16, 24)), ((16, 32), (24, 32))])
def test_widths_that_the_hardware_refuses_are_refused_on_a_cpu_too(x, weight):
    with pytest.raises(AssertionError):
        Fp8(False, True).linear(torch.randn(x), torch.randn(weight))


def test_a_model_of_such_widths_is_refused_by_name():
    parts = Parts.of(fp8.numerics(PrecisionConfig("fp8"), torch.device("cpu")))
    assert parts.dispatcher.row_multiple == 16
    with pytest.raises(ConfigError) as refused:
        Transformer(config_of(expert_hidden=24, head_dim=12), parts)
    assert [line.split(" is ")[0] for line in refused.value.problems] == [
        "the model's expert_hidden", "the model's kv_heads"
    ]  # fmt: skip


def test_a_product_of_many_rows_is_several_calls(monkeypatch):
    calls = []
    monkeypatch.setattr(linear, "MOST_ELEMENTS", 48 * 40)
    product, experts = Fp8(False, True), (4, 32, 48)
    for function, shape in (
        (product.grouped, experts),
        (linear.grouped_mm, experts),
        (lambda x, weight, _: product.linear(x, weight), (48, 32)),
    ):
        x, weight = operands(96, 32), operands(*shape)
        y = function(x, weight, ENDS)
        g = torch.randn_like(y)
        y.backward(g)
        again, once = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
        with monkeypatch.context() as unlimited:
            unlimited.setattr(linear, "MOST_ELEMENTS", 2**31 - 1)
            expected = function(again, once, ENDS)
            expected.backward(g)
        assert torch.equal(y, expected) and torch.equal(x.grad, again.grad)
        assert worst(weight.grad, once.grad) < 1e-6
        linear.in_pieces(lambda x, *_: calls.append(len(x)) or x, x, weight, None)
    assert calls == [32, 32, 32] * 3


# ---------------------------------------------------------------- rows of experts


@pytest.mark.parametrize("active", [1, 2])
@pytest.mark.parametrize("tokens", [1, 37, 160])
def test_rows_of_each_expert_are_filled_up_with_zeros_and_their_number_is_known_beforehand(tokens, active):
    torch.manual_seed(tokens)
    hidden, weight = torch.randn(tokens, 8), torch.rand(tokens, active)
    experts = torch.stack([torch.randperm(5)[:active] for _ in range(tokens)])
    plain, full = LocalDispatcher(), LocalDispatcher()
    full.row_multiple = 16
    short, long = (each.dispatch(hidden, experts, weight, 6) for each in (plain, full))
    ends, most = [0, *long.ends_E.tolist()], (tokens * active + 6 * 15) // 16 * 16
    assert ends[-1] == len(long.x_RD) == most and not any(end % 16 for end in ends) and ends == sorted(ends)
    assert long.ends_E.dtype == torch.int32 and torch.equal(long.counts_E, short.counts_E)
    start = 0
    for e, count in enumerate(short.counts_E.tolist()):
        own = long.x_RD[ends[e] : ends[e + 1]]
        assert torch.equal(own[:count], short.x_RD[start : start + count]) and not own[count:].any()
        start += count
    assert torch.equal(full.combine(long.x_RD, long.state), plain.combine(short.x_RD, short.state))


def test_the_most_rows_that_any_division_needs_are_enough_and_never_more():
    counts = [1] * 7
    ends = torch.tensor(counts).cumsum(0).int()
    found, later, most = filled(ends, 7, 16)
    assert found.tolist() == [16 * (e + 1) for e in range(7)] and most == 112
    assert later.tolist() == [15 * e for e in range(7)]


def test_a_model_with_filled_rows_computes_the_same():
    def model(multiple):
        dispatcher = LocalDispatcher()
        dispatcher.row_multiple = multiple
        torch.manual_seed(0)
        return Transformer(config_of(), PLAIN._replace(dispatcher=dispatcher))

    ids_BS = torch.randint(0, 64, (2, 9))
    plain, full = model(1), model(16)
    for each in (plain, full):
        each.logits(ids_BS).square().sum().backward()
    assert worst(full.logits(ids_BS), plain.logits(ids_BS)) < 1e-5
    grads = {name: p.grad for name, p in full.named_parameters()}
    assert all(worst(grads[name], p.grad) < 1e-5 for name, p in plain.named_parameters())
