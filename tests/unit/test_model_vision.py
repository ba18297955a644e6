"""Vision in the Transformer: names, init, seams to the text model, gradients always there, counts, freezing."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from distill.config.errors import DataError
from distill.config.schema import Freeze, VisionConfig
from distill.engine.optim import decay_group
from distill.model import Transformer, vision
from distill.model.count import multiplied_parameters, vision_flops_per_tile
from distill.model.freeze import freeze
from distill.model.images import Images
from distill.model.parts import Parts
from tests.closeness import apart, worst
from tests.image_corpus import in_order
from tests.unit.test_model_attention import config_of, random_documents
from tests.unit.test_model_transformer import preset

PRESETS = Path(__file__).resolve().parents[2] / "conf" / "vision"


def vision_config(**changes):
    sizes = dict(hidden_size=16, layers=2, heads=2, mlp_hidden=64, tile_size=8, patch_size=2, shuffle=2)
    return VisionConfig(**(sizes | dict(adapter_hidden=24, adapter_out=24, image_token_id=63) | changes))


def vision_model(seed=0, **changes):
    torch.manual_seed(seed)
    return Transformer(config_of(vision=vision_config(), **changes))


def batch(tiles=3, rows=2, length=15, seed=0):
    """ids and images: tokens of `tiles` tiles at random places, the first and the last of all among them."""
    g = torch.Generator().manual_seed(seed)
    ids_BS = torch.randint(0, 63, (rows, length), generator=g)
    tokens = tiles * vision_config().tile_tokens
    places = torch.randperm(rows * length - 2, generator=g)[: max(tokens - 2, 0)] + 1
    if tokens:
        ids_BS.view(-1)[torch.cat([places, torch.tensor([0, rows * length - 1])])] = 63
    tiles_NCHW = torch.randint(0, 256, (tiles, 3, 8, 8), dtype=torch.uint8, generator=g)
    return ids_BS, in_order(tiles_NCHW, ids_BS, 63, vision_config().tile_tokens)


def backward(model, ids_BS, images=None, documents_BS=None):
    """Loss, and every parameter's gradient; None where there is none."""
    model.zero_grad()
    loss, _ = model(ids_BS, documents_BS, lambda h, w: F.cross_entropy(h @ w.T, ids_BS.flatten()), images)
    loss.backward()
    return loss.detach(), {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def of_vision(name):
    return name.startswith(("vision_model.", "multi_modal_projector."))


# ---------------------------------------------------------------- names, init


def vision_preset(name):
    return OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(VisionConfig), OmegaConf.load(PRESETS / f"{name}.yaml"))
    )


def test_names_and_shapes_are_the_released_ones():
    with torch.device("meta"):
        model = Transformer(dataclasses.replace(preset("scout"), vision=vision_preset("llama4")))
    want = {
        "vision_model.class_embedding": [1408],
        "vision_model.positional_embedding_vlm": [577, 1408],
        "vision_model.patch_embedding.linear.weight": [1408, 588],
        "vision_model.vision_adapter.mlp.fc1.weight": [4096, 5632],
        "vision_model.vision_adapter.mlp.fc2.weight": [4096, 4096],
        "multi_modal_projector.linear_1.weight": [5120, 4096],
    }
    for norm in ("layernorm_pre", "layernorm_post"):
        want |= {f"vision_model.{norm}.weight": [1408], f"vision_model.{norm}.bias": [1408]}
    for j in range(34):
        block = f"vision_model.model.layers.{j}"
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
            want |= {f"{block}.{name}.weight": [1408, 1408], f"{block}.{name}.bias": [1408]}
        want |= {f"{block}.mlp.fc1.weight": [5632, 1408], f"{block}.mlp.fc1.bias": [5632]}
        want |= {f"{block}.mlp.fc2.weight": [1408, 5632], f"{block}.mlp.fc2.bias": [1408]}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            want |= {f"{block}.{norm}.weight": [1408], f"{block}.{norm}.bias": [1408]}
    assert {n: list(t.shape) for n, t in model.state_dict().items() if of_vision(n)} == want


def test_vision_does_not_change_the_text_model():
    torch.manual_seed(0)
    text_model = Transformer(config_of())
    model = vision_model()
    text = {n: t for n, t in model.state_dict().items() if not of_vision(n)}
    assert text.keys() == text_model.state_dict().keys()
    assert all(torch.equal(t, text_model.state_dict()[n]) for n, t in text.items())
    ids_BS, documents_BS = torch.randint(0, 64, (3, 21)), random_documents(3, 21, seed=1)
    (loss, grads), (expected, wanted) = (backward(m, ids_BS, None, documents_BS) for m in (model, text_model))
    assert torch.equal(loss, expected)
    assert all(torch.equal(grads[n], g) for n, g in wanted.items())


def test_init():
    torch.manual_seed(0)
    model = Transformer(
        config_of(vision=vision_config(hidden_size=64, mlp_hidden=256, heads=4, tile_size=32), init_std=0.02)
    )
    for name, parameter in model.named_parameters():
        if name.endswith(("class_embedding", "positional_embedding_vlm")):
            assert parameter.std().item() == pytest.approx(64**-0.5, rel=0.3), name
        elif of_vision(name) and parameter.ndim > 1:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
        elif of_vision(name):
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
    assert model.vision_model.positional_embedding_vlm.std().item() == pytest.approx(1 / 8, rel=0.05)


# ---------------------------------------------------------------- the seam


def test_features_take_the_rows_they_are_sent_to():
    g = torch.Generator().manual_seed(0)
    hidden_TD, features_NPD = torch.randn(10, 4, generator=g), torch.randn(2, 3, 4, generator=g)
    hidden_TD.requires_grad_()
    features_NPD.requires_grad_()
    patch_BS = torch.tensor([[5, -1, 0, 0, -1], [-1, 3, -1, -1, 4]])  # one twice; 1 and 2 nowhere
    out_TD = vision.place(hidden_TD, features_NPD, patch_BS)
    for t, index in enumerate(patch_BS.flatten().tolist()):
        row = hidden_TD[t] if index < 0 else features_NPD[index // 3, index % 3]
        assert torch.equal(out_TD[t], row)
    out_TD.sum().backward()
    assert hidden_TD.grad[:, 0].tolist() == [0, 1, 0, 0, 1, 1, 0, 1, 1, 0]
    assert features_NPD.grad[..., 0].tolist() == [[2, 0, 0], [1, 1, 1]]


def test_tiles_are_read_one_by_one_and_unused_ones_change_nothing():
    model = vision_model()
    ids_BS, images = batch(tiles=3)
    more = Images(torch.cat([images.tiles_NCHW, images.tiles_NCHW.flip(2)]), images.patch_BS)
    (loss, grads), (again, others) = backward(model, ids_BS, images), backward(model, ids_BS, more)
    assert again.item() == pytest.approx(loss.item(), rel=1e-5)
    for name, grad in grads.items():
        assert apart(others[name], grad, whole=grads.values()) < 1e-5, name
    one_by_one = torch.cat([model.vision_model(tile[None]) for tile in images.tiles_NCHW])
    assert worst(model.vision_model(images.tiles_NCHW), one_by_one) < 1e-5
    assert all(grad.abs().max() > 0 for name, grad in grads.items() if of_vision(name))


def test_images_stay_in_their_document():
    model = vision_model()
    ids_BS, images = batch(tiles=1, rows=1, length=12)
    ids_BS, patch_BS = torch.arange(12)[None], torch.full((1, 12), -1)
    patch_BS[0, 2:4] = torch.tensor([0, 1])
    documents_BS = (torch.arange(12) >= 6).long()[None]
    with torch.no_grad():
        one = model.logits(ids_BS, documents_BS, Images(images.tiles_NCHW, patch_BS))
        other = model.logits(ids_BS, documents_BS, Images(255 - images.tiles_NCHW, patch_BS))
    moved_S = (one - other).abs().amax((0, 2)) / one.abs().max()
    assert (moved_S[2:6] > 0.01).all() and moved_S[:2].max() < 1e-5 and moved_S[6:].max() < 1e-5


@pytest.mark.parametrize("empty", [True, False])
def test_a_batch_without_images_gives_vision_zero_gradients(empty):
    model = vision_model()
    ids_BS, images = batch(tiles=0)
    assert images.tiles_NCHW.shape == (0, 3, 8, 8)
    loss, grads = backward(model, ids_BS, images if empty else None)
    for name, grad in grads.items():
        assert grad is not None and grad.is_contiguous(), name
        assert (grad == 0).all() == of_vision(name), name
    assert torch.equal(model.logits(ids_BS), model.logits(ids_BS, images=images if empty else None))
    # A later batch without images leaves what is there.
    seen, _ = batch(tiles=2), None
    _, want = backward(model, *seen)
    loss, _ = model(ids_BS, None, lambda h, w: (h @ w.T).sum() * 0, images if empty else None)
    loss.backward()
    assert all(torch.equal(p.grad, want[n]) for n, p in model.named_parameters())


def test_what_does_not_fit_is_refused_in_one_sentence():
    model, text_model = vision_model(), Transformer(config_of())
    ids_BS, (tiles, patch_BS) = batch()
    wrong = {
        "int32 [3, 3, 8, 8]; the model takes uint8 (or scaled floating-point) [N, 3, 8, 8]": (tiles.int(), patch_BS),
        "uint8 [3, 3, 8, 16]": (torch.cat([tiles, tiles], 3), patch_BS),
        "uint8 [3, 1, 8, 8]": (tiles[:, :1], patch_BS),
        "uint8 [3, 8, 8]": (tiles[0], patch_BS),
        "patch_BS holds -1 to 11; 2 tiles of 4 tokens allow -1 to 7": (tiles[:2], patch_BS),
        "patch_BS holds -2 to 10": (tiles, patch_BS - 1),
        "0 tiles of 4 tokens allow -1 to -1": (tiles[:0], patch_BS),
        "patch_BS is torch.int64 [2, 14]; it must be int64 [2, 15]": (tiles, patch_BS[:, 1:]),
        "patch_BS is torch.int32 [2, 15]": (tiles, patch_BS.int()),
    }
    for part, images in wrong.items():
        with pytest.raises(DataError) as caught:
            model.logits(ids_BS, images=Images(*images))
        assert part in str(caught.value), (part, str(caught.value))
    with pytest.raises(DataError, match=r"int32.*; patch_BS is torch.int32"):
        model.logits(ids_BS, images=Images(tiles.int(), patch_BS.int()))
    with pytest.raises(DataError, match="a model without vision"):
        text_model.logits(ids_BS, images=Images(tiles, patch_BS))


def test_evaluation_before_training_leaves_training_possible():
    model = vision_model()
    ids_BS, images = batch()
    with torch.inference_mode():
        model.logits(ids_BS, images=images)
        model.logits(ids_BS)
    backward(model, ids_BS, images)


def test_the_functions_handed_in_are_for_the_text_model_alone():
    def linear_fn(x, weight):
        calls.append(weight.shape)
        return F.linear(x, weight)

    config, calls = config_of(vision=vision_config()), []
    torch.manual_seed(0)
    Transformer(config, Parts(linear_fn)).logits(*batch()[:1])
    text = len(calls)
    ids_BS, images = batch()
    Transformer(config, Parts(linear_fn)).logits(ids_BS, images=images)
    assert len(calls) == 2 * text


# ---------------------------------------------------------------- activation checkpointing


def test_activation_checkpointing_covers_the_tower_and_changes_no_bit(monkeypatch):
    model, calls = vision_model(), []
    for block in model.vision_model.model.layers:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    ids_BS, images = batch()
    _, want = backward(model, ids_BS, images)
    assert len(calls) == 2
    model.activation_checkpointing = True
    _, got = backward(model, ids_BS, images)
    assert len(calls) == 2 + 4  # each block once more
    assert all(torch.equal(got[name], grad) for name, grad in want.items())


# ---------------------------------------------------------------- counts


@pytest.mark.parametrize("name", ["llama4", "tiny"])
@pytest.mark.parametrize("text", ["scout", "tiny_maverick"])
def test_vision_changes_no_count_of_the_text_model(name, text):
    config = dataclasses.replace(preset(text), vision=vision_preset(name))
    assert multiplied_parameters(config) == multiplied_parameters(preset(text))


def test_released_sizes():
    with torch.device("meta"):
        models = {n: Transformer(dataclasses.replace(preset(n), vision=vision_preset("llama4"))) for n in RELEASED}
    assert {n: size(model) for n, model in models.items()} == RELEASED
    parts = {(size(model.vision_model), size(model.multi_modal_projector)) for model in models.values()}
    assert parts == {(850_960_896, 20_971_520)}
    assert vision_preset("llama4").tile_tokens == 144 and vision_preset("tiny").tile_tokens == 4


def size(module):
    return sum(p.numel() for p in module.parameters())


RELEASED = {"scout": 108_641_793_536, "maverick": 401_583_781_376}


def test_flops_equal_what_is_multiplied():
    model = vision_model()
    _, images = batch(tiles=3)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.multi_modal_projector(model.vision_model(images.tiles_NCHW))
    assert counter.get_total_flops() == 3 * vision_flops_per_tile(model.config)
    assert vision_flops_per_tile(config_of()) == 0


# ---------------------------------------------------------------- decay groups, freezing


def test_every_parameter_of_vision_has_its_decay_group():
    groups = {n: decay_group(n) for n, _ in vision_model().named_parameters()}
    matrices = {n for n, g in groups.items() if of_vision(n) and g == "matrices"}
    assert {n for n, g in groups.items() if of_vision(n)} - matrices == {
        n for n, g in groups.items() if of_vision(n) and g == "norms"
    }
    assert matrices == {
        n
        for n, p in vision_model().named_parameters()
        if of_vision(n) and p.ndim == 2 and not n.endswith("positional_embedding_vlm")
    }
    assert [n for n, g in groups.items() if g == "embedding"] == ["embed.weight"]


@pytest.mark.parametrize("what", Freeze)
@pytest.mark.parametrize("images", [True, False])
def test_the_projector_always_trains_and_the_frozen_half_gets_no_gradient(what, images):
    model = vision_model()
    freeze(model, what)
    model.activation_checkpointing = True
    ids_BS, seen = batch()
    _, grads = backward(model, ids_BS, seen if images else None)
    for name, grad in grads.items():
        half = "vision" if name.startswith("vision_model.") else "text" if not of_vision(name) else "projector"
        assert (grad is None) == (what.value == half), name
    assert grads["multi_modal_projector.linear_1.weight"].abs().max().item() > 0 or not images
    assert math.isfinite(sum(g.double().sum().item() for g in grads.values() if g is not None))
