"""Vision against transformers: tower, projector, logits, gradients, bf16, and that the comparison bites."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from distill.config.schema import VisionConfig
from distill.model import Transformer, hf, vision
from distill.model.rope import cos_sin
from tests.closeness import apart, worst
from tests.image_corpus import in_order
from tests.parity.test_hf_text import CASES, MIXED_TOP1, fp32_router

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

TOKEN = 92

# What each exercises, tiles per row, and the text model's settings; a row is `LENGTH` tokens.
CONFIGS = {
    "like the release": (dict(hidden_size=64, heads=4, tile_size=56, patch_size=14, shuffle=2), (2, 1), "mixed"),
    "large shuffle, other theta": (
        dict(hidden_size=96, heads=2, tile_size=48, patch_size=4, shuffle=4, rope_theta=100.0), (1, 2), "scout",
    ),
    "no shuffle, odd grid": (dict(hidden_size=40, heads=5, tile_size=42, patch_size=14, shuffle=1), (0, 3), "maverick"),
    "thirds, few channels": (
        dict(hidden_size=32, heads=8, tile_size=18, patch_size=3, shuffle=3), (4, 2), "all_experts",
    ),
}  # fmt: skip
RELEASED_GRID = dict(hidden_size=176, heads=2, tile_size=336, patch_size=14, shuffle=2)  # head_dim 88, 577 rows
LENGTH = 40


def vision_config(sizes, layers=3):
    width = sizes["hidden_size"] * sizes["shuffle"] ** 2
    adapter = dict(mlp_hidden=width, adapter_hidden=48, adapter_out=48, image_token_id=TOKEN)
    return VisionConfig(layers=layers, **sizes, **adapter)


def theirs_of(config, text):
    """A transformers model of the configuration, with weights that exercise norms and biases."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    tower = dict(
        hidden_size=config.hidden_size, num_hidden_layers=config.layers, num_attention_heads=config.heads,
        intermediate_size=config.mlp_hidden, image_size=config.tile_size, patch_size=config.patch_size,
        pixel_shuffle_ratio=1 / config.shuffle, projector_input_dim=config.adapter_hidden,
        projector_output_dim=config.adapter_out, vision_output_dim=config.adapter_out, rope_parameters=rope,
    )  # fmt: skip
    torch.manual_seed(1)
    settings = transformers.Llama4Config(text_config=text, vision_config=tower, image_token_index=TOKEN)
    theirs = transformers.Llama4ForConditionalGeneration(settings)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            norm = "norm" in name and name.endswith("weight")
            parameter.normal_(1, 0.1) if norm else parameter.normal_(0, 0.08)
    return theirs.eval()


def own_name(key):
    text = key.removeprefix("language_model.")
    if text == key:
        return key
    own = {"model.embed_tokens.weight": "embed.weight", "lm_head.weight": "head.weight"}
    return own.get(text, text.removeprefix("model."))


def ours_of(config, text, theirs):
    whole = hf.config_from_json(text | {"model_type": "llama4_text"})
    ours = Transformer(dataclasses.replace(whole, vision=config))
    state = {own_name(key): value for key, value in theirs.state_dict().items()}
    missing, unknown = ours.load_state_dict(state, strict=False)
    assert not unknown and all(key.endswith("router.bias") for key in missing)
    return ours


def inputs(config, tiles_per_row, length=LENGTH):
    """ids, tiles, the pixels that transformers takes; image tokens anywhere, first and last positions among them."""
    g = torch.Generator().manual_seed(2)
    ids_BS = torch.randint(3, 90, (len(tiles_per_row), length), generator=g)
    for row, tiles in enumerate(tiles_per_row):
        count = tiles * config.tile_tokens
        assert count <= length
        places = torch.cat([torch.tensor([0, length - 1]), torch.randperm(length - 2, generator=g) + 1])
        ids_BS[row, places[:count]] = TOKEN
    shape = (sum(tiles_per_row), 3, config.tile_size, config.tile_size)
    tiles_NCHW = torch.randint(0, 256, shape, dtype=torch.uint8, generator=g)
    images = in_order(tiles_NCHW, ids_BS, TOKEN, config.tile_tokens)
    return ids_BS, images, (tiles_NCHW.float() / 255 - 0.5) / 0.5


def case(name):
    sizes, tiles_per_row, text = CONFIGS[name]
    config = vision_config(sizes)
    theirs = theirs_of(config, CASES[text])
    return ours_of(config, CASES[text], theirs), theirs, *inputs(config, tiles_per_row)


def close(ours, theirs, what):
    assert worst(ours, theirs) < 2e-5, what


@pytest.mark.parametrize("name", CONFIGS)
def test_tower_projector_logits_and_gradients(name):
    ours, theirs, ids_BS, images, pixels = case(name)
    tower = ours.vision_model(images.tiles_NCHW)
    projected = ours.multi_modal_projector(tower)
    logits = ours.logits(ids_BS, images=images)
    assert not torch.allclose(logits, ours.logits(ids_BS), atol=0.1)  # what is seen is heard
    assert torch.equal(logits, ours.logits(ids_BS, images=images._replace(tiles_NCHW=pixels)))
    for attention in ("eager", "sdpa"):
        theirs.set_attn_implementation(attention)
        expected = theirs.vision_model(pixels).last_hidden_state
        close(tower, expected, f"tower, {attention}")
        close(projected, theirs.multi_modal_projector(expected), f"projector, {attention}")
        answer = theirs(ids_BS, pixel_values=pixels, use_cache=False).logits
        close(logits, answer, f"logits, {attention}")
    for out in (logits, answer):
        F.cross_entropy(out[:, :-1].flatten(0, 1), ids_BS[:, 1:].flatten()).backward()
    found = {n: p.grad for n, p in ours.named_parameters()}
    for key, parameter in theirs.named_parameters():
        assert apart(found[own_name(key)], parameter.grad) < 4e-5, key


def test_the_released_grid():
    config = vision_config(RELEASED_GRID, layers=2)
    theirs = theirs_of(config, MIXED_TOP1)
    ours = ours_of(config, MIXED_TOP1, theirs)
    ids_BS, images, pixels = inputs(config, (1,), length=150)
    with torch.no_grad():
        close(ours.vision_model(images.tiles_NCHW), theirs.vision_model(pixels).last_hidden_state, "tower")
        answer = theirs(ids_BS, pixel_values=pixels, use_cache=False).logits
        close(ours.logits(ids_BS, images=images), answer, "logits")


def complex_rotate(x, cos, sin):
    """`rotate` as transformers has it: the same but for the order of roundings in fp32."""
    turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * torch.complex(cos[..., ::2], sin[..., 1::2])
    return torch.view_as_real(turned).flatten(-2).type_as(x)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_tower_in_bf16_is_bitwise_equal_but_for_the_rounding_of_rotations(tmp_path, monkeypatch, name):
    fp32_router(monkeypatch)
    sizes, tiles_per_row, _ = CONFIGS[name]
    text = MIXED_TOP1 | {"attention_chunk_size": 64}  # one chunk per row, as in the text model's own test
    config = vision_config(sizes)
    whole = theirs_of(config, text)
    whole.save_pretrained(tmp_path)
    theirs = transformers.Llama4ForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()
    ours = ours_of(config, text, whole).to(torch.bfloat16)
    ids_BS, images, pixels = inputs(config, tiles_per_row)
    with torch.no_grad():
        exact = ours_of(config, text, whole).logits(ids_BS, images=images)
        tower = theirs.vision_model(pixels.bfloat16()).last_hidden_state
        logits = theirs(ids_BS, pixel_values=pixels.bfloat16(), use_cache=False).logits
        # A rotation's last bit may tip a rounding to bf16; where it does differs between processors.
        assert (ours.logits(ids_BS, images=images) - logits).norm() < 0.5 * (logits - exact).norm()
        monkeypatch.setattr(vision, "rotate", complex_rotate)
        assert torch.equal(ours.vision_model(images.tiles_NCHW), tower)


def patches_by_row_column_channel(tiles_NCHW, patch_size):
    cut = tiles_NCHW.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def shuffled_by_column(patches_NGD, shuffle):
    grid = round(patches_NGD.shape[1] ** 0.5)
    squares = patches_NGD.unflatten(1, (grid // shuffle, shuffle, grid // shuffle, shuffle))
    return squares.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)


def rotation_by_row_first(grid, head_dim, theta):
    cos, sin = vision.grid_rotation(grid, head_dim, theta)
    return cos.roll(head_dim // 2, -1), sin.roll(head_dim // 2, -1)


def rotation_from_zero(grid, head_dim, theta):
    turns_P = vision.frequencies(head_dim // 2, theta, None)
    place = torch.arange(grid * grid)
    angle = torch.cat([(place % grid)[:, None] * turns_P, (place // grid)[:, None] * turns_P], 1)
    return tuple(x[:, None] for x in cos_sin(F.pad(angle, (0, 0, 0, 1))))


def test_the_comparison_has_teeth(monkeypatch):
    sizes, _, text = CONFIGS["like the release"]
    config = vision_config(sizes)
    theirs = theirs_of(config, CASES[text])
    _, images, pixels = inputs(config, (2, 1))
    with torch.no_grad():
        expected = theirs.vision_model(pixels).last_hidden_state

        def error(change=lambda model: None):
            model = ours_of(config, CASES[text], theirs)
            change(model.vision_model)
            return worst(model.vision_model(images.tiles_NCHW), expected)

        assert error() < 2e-5
        grid, head_dim = config.tile_size // config.patch_size, config.hidden_size // config.heads
        changes = {
            "row before column in RoPE": lambda m: setattr(
                m, "_rotation", rotation_by_row_first(grid, head_dim, config.rope_theta)
            ),
            "RoPE counts from 0": lambda m: setattr(
                m, "_rotation", rotation_from_zero(grid, head_dim, config.rope_theta)
            ),
            "no RoPE": lambda m: setattr(
                m, "_rotation", tuple(torch.full_like(x, i == 0) for i, x in enumerate(m._rotation))
            ),
            "class token first": lambda m: m.positional_embedding_vlm.copy_(m.positional_embedding_vlm.roll(1, 0)),
            "no class token": lambda m: m.class_embedding.zero_(),
            "no bias": lambda m: m.model.layers[1].self_attn.v_proj.bias.zero_(),
        }
        for what, change in changes.items():
            assert error(change) > 1e-3, what
        functions = {
            "pixel_shuffle": (shuffled_by_column, "shuffle by column, row, channel"),
            "patches": (patches_by_row_column_channel, "pixels by row, column, channel"),
            "pixels": (lambda x, dtype: x.to(dtype) / 255, "pixels in [0, 1]"),
        }
        for name, (function, what) in functions.items():
            with monkeypatch.context() as patch:
                patch.setattr(vision, name, function)
                assert error() > 1e-3, what
