"""The whole model: seams, determinism, construction; and sizes against meta-device models."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from distill.config.schema import ModelConfig
from distill.model import Segments, Transformer
from distill.model.count import flops_per_token, multiplied_parameters
from distill.model.parts import Parts
from tests.closeness import worst
from tests.unit.test_model_attention import config_of, random_documents

PRESETS = Path(__file__).resolve().parents[2] / "conf" / "model"


def preset(name):
    return OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(PRESETS / f"{name}.yaml"))
    )


def backward(model, ids_BS, documents_BS=None):
    loss, _ = model(ids_BS, documents_BS, lambda h, w: F.cross_entropy(h @ w.T, ids_BS.flatten()))
    loss.backward()
    return loss, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_head_fn_runs_inside_the_module_that_owns_the_weight():
    model = Transformer(config_of())
    inside = []
    model.head.register_forward_pre_hook(lambda *_: inside.append("in"))
    model.head.register_forward_hook(lambda *_: inside.append("out"))

    def head_fn(hidden_TD, weight_VD):
        assert inside == ["in"] and weight_VD is model.head.weight
        return hidden_TD, "anything"

    ids_BS = torch.randint(0, 64, (2, 9))
    (hidden_TD, extra), _ = model(ids_BS, head_fn=head_fn)
    assert inside == ["in", "out"] and extra == "anything"
    plain_TD, _ = model(ids_BS)
    assert torch.equal(plain_TD, hidden_TD) and plain_TD.shape == (18, 32)
    assert torch.equal(model.logits(ids_BS), (plain_TD @ model.head.weight.T).view(2, 9, 64))


def test_functions_handed_in_do_the_products():
    calls = {"linear": 0, "grouped": 0}

    def linear_fn(x, weight):
        calls["linear"] += 1
        return F.linear(x, weight)

    def grouped_fn(x, weight, ends_E):
        calls["grouped"] += 1
        starts = [0, *ends_E.tolist()[:-1]]
        return torch.cat([x[a:b] @ w for a, b, w in zip(starts, ends_E.tolist(), weight)])

    torch.manual_seed(0)
    ours = Transformer(config_of(), Parts(linear_fn, grouped_fn))
    torch.manual_seed(0)
    plain = Transformer(config_of())
    ids_BS = torch.randint(0, 64, (2, 9))
    assert worst(ours.logits(ids_BS), plain.logits(ids_BS)) < 1e-5
    assert calls == {"linear": 4 * 4 + 4 * 3, "grouped": 2 * 2}  # not the routers, not the head


def test_same_seed_same_bits():
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        model = Transformer(config_of())
        results.append(backward(model, torch.randint(0, 64, (3, 21)), random_documents(3, 21, seed=1)))
    assert torch.equal(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        assert torch.equal(grad, results[1][1][name]), name


def test_segments_may_be_built_ahead():
    torch.manual_seed(0)
    model = Transformer(config_of())
    ids_BS, documents_BS = torch.randint(0, 64, (2, 30)), random_documents(2, 30, seed=3)
    ahead = model.logits(ids_BS, Segments.build(documents_BS, model.config.chunk_size))
    assert torch.equal(ahead, model.logits(ids_BS, documents_BS))
    assert torch.equal(model.logits(ids_BS), model.logits(ids_BS, torch.zeros(2, 30, dtype=torch.int64)))


def test_evaluation_before_training_leaves_training_possible():
    torch.manual_seed(0)
    model = Transformer(config_of())
    ids_BS = torch.randint(0, 64, (2, 23))
    with torch.inference_mode():
        model.logits(ids_BS)
        model.logits(ids_BS, random_documents(2, 23, seed=0))
    backward(model, ids_BS)


def test_init_is_normal_with_norms_one():
    torch.manual_seed(0)
    model = Transformer(config_of(hidden_size=64, vocab_size=256, init_std=0.02))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name
            assert abs(parameter.mean().item()) < 0.002, name


def test_meta_models_draw_nothing():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Transformer(config_of())
    assert all(p.is_meta for p in model.parameters())
    assert torch.equal(torch.rand(1), expected)


# ---------------------------------------------------------------- counts

SIZED = ["scout", "maverick", "behemoth", "tiny_scout", "tiny_maverick", "tiny_behemoth"]


def meta_model(config):
    with torch.device("meta"):
        return Transformer(config)


def sizes(config):
    """Parameters in all, and those that one token of text uses."""
    model = meta_model(config)
    routed = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    total = sum(p.numel() for p in model.parameters())
    return total, total - routed + routed // config.experts * config.active_experts


@pytest.mark.parametrize("name", SIZED)
def test_formula_counts_equal_a_meta_model(name):
    config = preset(name)
    _, active = sizes(config)
    model = meta_model(config)
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert multiplied_parameters(config) == active - model.embed.weight.numel() - norms


def test_released_sizes():
    scout, maverick = preset("scout"), preset("maverick")
    assert sizes(scout) == (107_769_861_120, 17_172_894_720)
    assert sizes(maverick) == (400_711_848_960, 17_184_691_200)
    embedding = {c.vocab_size * c.hidden_size for c in (scout, maverick)}
    assert embedding == {17_172_894_720 - 16_138_408_960} == {17_184_691_200 - 16_150_205_440}


def test_assumed_behemoth_has_the_published_size():
    total, active = sizes(preset("behemoth"))
    assert round(active / 1e9, 1) == 287.2 and round(total / 1e12, 3) == 2.015
    assert total - active == 15 * 88 * 1_308_622_848


@pytest.mark.parametrize("chunk", [None, 8, 7])
def test_flops_equal_what_is_multiplied(chunk):
    config = config_of(chunk_size=chunk)
    model = Transformer(config)
    tokens = 24
    products = 0
    for name, p in model.named_parameters():
        if p.ndim == 2 and name != "embed.weight":
            products += 2 * p.numel()
        elif p.ndim == 3:
            products += 2 * p[0].numel()
    pairs = 0
    for layer in range(config.layers):
        for t in range(tokens):
            first = t // chunk * chunk if chunk and layer != 3 else 0
            pairs += t - first + 1
    expected = products + 4 * config.heads * config.head_dim * pairs / tokens
    assert flops_per_token(config, tokens) == pytest.approx(expected, rel=1e-12)
    if chunk != 7:  # there a tail is padded to its call's length
        with FlopCounterMode(display=False) as counter:
            model.logits(torch.zeros(1, tokens, dtype=torch.int64))
        plain = sum(2 * p.numel() for n, p in model.named_parameters() if p.ndim == 2 and n != "embed.weight")
        assert counter.get_flop_counts()["Global"][torch.ops.aten.mm] == plain * tokens


@pytest.mark.parametrize("active", [1, 2])
def test_activation_checkpointing_is_bitwise_the_same_and_counts_tokens_once(active):
    torch.manual_seed(0)
    model = Transformer(config_of(layers=4, active_experts=active))
    ids_BS, documents_BS = torch.randint(0, 64, (2, 30)), random_documents(2, 30, seed=3)
    seen = []
    for choice in (False, True):
        model.activation_checkpointing = choice
        model.zero_grad()
        kept = 0

        def keep(tensor):
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss, routing = model(ids_BS, documents_BS, lambda h, w: F.cross_entropy(h @ w.T, ids_BS.flatten()))
        before = routing.counts_LE.clone()
        (loss + sum(x.square().mean() for x in routing.logits_LTE)).backward()
        assert torch.equal(routing.counts_LE, before) and (before.sum(1) == 60 * active).all()
        seen.append(({n: p.grad.clone() for n, p in model.named_parameters()}, before, kept))
    for name, grad in seen[0][0].items():
        assert torch.equal(grad, seen[1][0][name]), name
    assert torch.equal(seen[0][1], seen[1][1])
    assert seen[1][2] < seen[0][2] / 4
