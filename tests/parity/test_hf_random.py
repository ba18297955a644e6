"""Random small models, text alone and with vision: transformers saves and we load, we save and transformers loads."""

import json
import random

import pytest
import torch

from distill.model import hf
from tests.closeness import worst
from tests.image_corpus import in_order

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

SEEDS = range(12)
CLOSE = 2e-5


def text_settings(draw):
    heads = draw.choice([1, 2, 3, 4, 6])
    layers, experts = draw.randint(1, 6), draw.randint(1, 5)
    some = sorted(draw.sample(range(layers), draw.randint(0, layers)))
    low = draw.choice([0.5, 1.0, 2.0])
    llama3 = {"rope_type": "llama3", "factor": draw.choice([1.0, 3.5, 16.0]), "low_freq_factor": low,
              "high_freq_factor": low * draw.choice([1, 1.5, 4]),
              "original_max_position_embeddings": draw.choice([8, 31, 64])}  # fmt: skip
    rope = draw.choice([{"rope_type": "default"}, llama3]) | {"rope_theta": draw.choice([100.0, 10000.0, 500000.0])}
    return {
        "vocab_size": draw.randint(20, 90),
        "hidden_size": draw.choice([8, 12, 30, 64]),
        "intermediate_size": draw.choice([4, 16, 37, 48]),
        "intermediate_size_mlp": draw.randint(1, 70),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([n for n in range(1, heads + 1) if heads % n == 0]),
        "head_dim": draw.choice([2, 4, 8, 14, 16]),
        "num_local_experts": experts,
        "num_experts_per_tok": draw.randint(1, experts),
        "interleave_moe_layer_step": draw.randint(1, layers + 1),
        "moe_layers": draw.choice([None, some]),
        "no_rope_layer_interval": draw.randint(1, layers + 1),
        "no_rope_layers": draw.choice([None, [], [draw.randint(0, 1) for _ in range(layers)]]),
        "attention_chunk_size": draw.choice([1, 3, 8, 33, 200]),
        "use_qk_norm": draw.random() < 0.5,
        "attn_temperature_tuning": draw.random() < 0.7,
        "floor_scale": draw.choice([1, 4, 7, 8192]),
        "attn_scale": draw.choice([0.1, 0.5]),
        "rope_parameters": rope,
        "max_position_embeddings": 256,
        "rms_norm_eps": draw.choice([1e-5, 1e-3]),
        "pad_token_id": draw.choice([None, 0]),
        "bos_token_id": draw.choice([None, 1]),
        "eos_token_id": draw.choice([None, 2, [2, 3]]),
    }


def vision_settings(draw):
    heads, ratio, patch = draw.choice([1, 2, 4]), draw.choice([0.5, 1.0, 0.25]), draw.choice([2, 5, 14])
    size, adapter = heads * 4 * draw.randint(1, 3), draw.choice([8, 24])
    return {
        "hidden_size": size,
        "num_hidden_layers": draw.randint(1, 3),
        "num_attention_heads": heads,
        "intermediate_size": int(size / ratio**2),
        "image_size": patch * int(1 / ratio) * draw.randint(1, 2),
        "patch_size": patch,
        "pixel_shuffle_ratio": ratio,
        "projector_input_dim": adapter,
        "projector_output_dim": adapter,
        "vision_output_dim": adapter,
        "rope_parameters": {"rope_type": "default", "rope_theta": draw.choice([100.0, 10000.0])},
    }


@torch.no_grad()
def drawn(seed, vision):
    """A transformers model whose norms, routers and biases matter, and ids for it."""
    draw = random.Random(seed)
    settings = text_settings(draw)
    torch.manual_seed(seed)
    if vision:
        config = transformers.Llama4Config(
            text_config=settings, vision_config=vision_settings(draw), image_token_index=settings["vocab_size"] - 1
        )
        model = transformers.Llama4ForConditionalGeneration(config)
    else:
        model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**settings))
    for name, parameter in model.named_parameters():
        norm = "norm" in name and name.endswith("weight")
        parameter.normal_(1, 0.1) if norm else parameter.normal_(0, 0.1)
    shape = (draw.randint(1, 3), draw.randint(1, 45))
    return model.eval(), torch.randint(3, settings["vocab_size"] - 1, shape)


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_text(tmp_path, seed):
    theirs, ids_BS = drawn(seed, vision=False)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    ours = hf.load(tmp_path / "theirs")
    expected = theirs(ids_BS, use_cache=False).logits
    assert worst(ours.logits(ids_BS), expected) < CLOSE
    hf.save(ours, tmp_path / "ours", max_shard_bytes=30_000)
    back, info = transformers.Llama4ForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert_same_weights(theirs, back)
    assert worst(back(ids_BS, use_cache=False).logits, expected) < CLOSE
    assert_same_settings(theirs.config, back.config)


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_with_vision(tmp_path, seed):
    theirs, ids_BS = drawn(seed, vision=True)
    vision = theirs.config.vision_config
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    ours = hf.load(tmp_path / "theirs")
    tokens = ours.config.vision.tile_tokens
    tiles = torch.randint(0, 256, (2, 3, vision.image_size, vision.image_size), dtype=torch.uint8)
    ids_BS = torch.cat([ids_BS[:1]] * -(-3 * tokens // ids_BS.shape[1]), 1)  # room for the tiles
    ids_BS[0, torch.randperm(ids_BS.shape[1])[: 2 * tokens]] = theirs.config.image_token_index
    images = in_order(tiles, ids_BS, theirs.config.image_token_index, tokens)
    pixels = (tiles.float() / 255 - 0.5) / 0.5
    expected = theirs(ids_BS, pixel_values=pixels, use_cache=False).logits
    assert worst(ours.logits(ids_BS, images=images), expected) < CLOSE

    text = hf.load(tmp_path / "theirs", vision=False)
    plain = theirs(ids_BS, use_cache=False).logits
    assert worst(text.logits(ids_BS), plain) < CLOSE

    hf.save(ours, tmp_path / "ours", max_shard_bytes=30_000)
    back, info = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert isinstance(back, transformers.Llama4ForConditionalGeneration) and not any(info.values()), info
    assert_same_weights(theirs, back)
    assert worst(back(ids_BS, pixel_values=pixels, use_cache=False).logits, expected) < CLOSE
    assert_same_settings(theirs.config, back.config)


def assert_same_weights(theirs, back):
    theirs, back = theirs.state_dict(), back.state_dict()
    assert theirs.keys() == back.keys() and all(torch.equal(tensor, back[key]) for key, tensor in theirs.items())


def assert_same_settings(theirs, back):
    """What both configurations say, without what only one of them writes."""
    theirs, back = (flat(json.loads(config.to_json_string())) for config in (theirs, back))
    assert theirs == back


def flat(config, prefix=""):
    inert = {"interleave_moe_layer_step", "no_rope_layer_interval", "vision_feature_layer", "architectures", "dtype"}
    found = {}
    for key, value in config.items():
        if key.endswith("_config"):
            found |= flat(value, f"{prefix}{key}.")
        elif key not in inert:
            found[prefix + key] = value
    return found
