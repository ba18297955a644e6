"""What bf16 means: operands of bf16, sums in fp32, on every processor; router logits in fp32; what a device lacks."""

import pytest
import torch
import torch.nn.functional as F

from distill.config.schema import PrecisionConfig
from distill.model import Transformer
from distill.model.linear import NATIVE, grouped_mm
from distill.model.parts import Parts
from distill.model.precision import automatic, lacking, numerics_of
from tests.closeness import apart
from tests.unit.test_model_transformer import config_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BF16 = numerics_of(PrecisionConfig("bf16"), CPU)


def gradients(product, operands, wide):
    """Result and gradients of operands [bf16], in fp64 throughout or as the product computes them."""
    own = [x.double() if wide else x.clone() for x in operands]
    own = [x.detach().requires_grad_() for x in own]
    out = product(*own)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    return [out.detach(), *torch.autograd.grad(out, own, g.double() if wide else g)]


@pytest.mark.parametrize("kind", ["linear", "grouped", "attend"])
def test_emulated_products_are_those_of_bf16_operands_rounded_once(kind):
    g = torch.Generator().manual_seed(0)
    shapes = {"linear": [(40, 512), (24, 512)], "grouped": [(40, 64), (3, 64, 32)], "attend": 3 * [(2, 4, 16, 16)]}
    operands = [torch.randn(shape, generator=g).bfloat16() for shape in shapes[kind]]
    ends_E = torch.tensor([8, 8, 40], dtype=torch.int32)
    ours = {
        "linear": BF16.linear_fn,
        "grouped": lambda x, w: BF16.grouped_fn(x, w, ends_E),
        "attend": lambda *qkv: BF16.plain.attend(*qkv, is_causal=True),
    }[kind]
    oracle = {
        "linear": lambda x, w: x @ w.T,
        "grouped": lambda x, w: torch.cat([x[:8] @ w[0], x[8:] @ w[2]]) + 0 * w[1].sum(),
        "attend": lambda q, k, v: (
            (q @ k.mT / 4).masked_fill(torch.ones(16, 16).triu(1).bool(), -torch.inf).softmax(-1) @ v
        ),
    }[kind]
    for found, want in zip(gradients(ours, operands, wide=False), gradients(oracle, operands, wide=True), strict=True):
        assert found.dtype == torch.bfloat16
        # Once rounded, a number is at most half a unit of its eight bits off; a sum in bf16 is off by several.
        assert ((found.double() - want).abs() <= want.abs() * 2**-8 + 1e-5).all()


def test_native_products_by_a_key_and_elsewhere_than_on_a_cpu():
    for found in (numerics_of(PrecisionConfig("bf16", native=True), CPU), numerics_of(PrecisionConfig("bf16"), CUDA)):
        assert found == (torch.bfloat16, F.linear, grouped_mm, NATIVE, 1)


def test_a_model_in_emulated_bf16_is_near_the_native_one_and_trains():
    ids_BS = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    found = {}
    for name, parts in (("fp32", Parts()), ("native", Parts()), ("emulated", Parts.of(BF16))):
        torch.manual_seed(0)
        model = Transformer(config_of(), parts).to(torch.float32 if name == "fp32" else torch.bfloat16)
        logits, routing = model(ids_BS, None, model.linear)
        assert all(each.dtype == torch.float32 for each in routing.logits_LTE)
        F.cross_entropy(logits.float(), ids_BS.flatten()).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        found[name] = logits.detach().float()
    assert 1e-4 < apart(found["emulated"], found["fp32"]) < 0.03
    assert apart(found["emulated"], found["native"]) < 0.03


def test_router_logits_are_sums_in_fp32():
    torch.manual_seed(0)
    router = Transformer(config_of()).bfloat16().routers[0]
    hidden_TD = torch.randn(50, router.weight.shape[1]).bfloat16()
    logits_TE, _, weight_TA = router(hidden_TD)
    want = hidden_TD.double() @ router.weight.double().T
    assert logits_TE.dtype == torch.float32 and apart(logits_TE, want) < 1e-6
    assert weight_TA.dtype == torch.bfloat16


@pytest.mark.parametrize(("capability", "name"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp32")])
def test_auto_takes_bf16_where_a_gpu_has_it(monkeypatch, capability, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert (automatic(CUDA), automatic(CPU)) == (name, "fp32")
    assert numerics_of(PrecisionConfig(), CUDA) == numerics_of(PrecisionConfig(name), CUDA)
    assert (lacking("bf16", CUDA) is None) == (name == "bf16") and lacking("bf16", CPU) is None
    if name == "fp32":
        assert lacking("bf16", CUDA) == (
            "precision.name is bf16; it needs a GPU of compute capability 8.0, and Tesla T4 has 7.5; allowed there: "
            "auto, fp32"
        )
