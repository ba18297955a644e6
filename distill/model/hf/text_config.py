"""`config.json` of the Llama 4 family, in all its spellings, to and from a `ModelConfig`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from distill.config.errors import CheckpointError
from distill.config.schema import ModelConfig, RopeScaling
from distill.model.hf import vision_config
from distill.model.hf.config_fields import Fields
from distill.model.layer_kinds import moe_layers, rope_layers

_INERT = frozenset(("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"))
"""Keys of text_config that transformers never reads for the logits."""
_INERT_ABOVE = frozenset(("bos_token_id", "eos_token_id", "pad_token_id", "vision_feature_layer"))
"""Keys beside text_config that say nothing more than it does."""
_IMAGE_TOKENS = {"boi_token_index": 200080, "eoi_token_index": 200081}
"""Around an image, as released; they are in the text, and no model computes with them."""


def config_from_json(data: dict[str, Any], file: str = "config.json", vision: bool = True) -> ModelConfig:
    """The model of a parsed `config.json`: text alone, or text_config and vision_config.

    Class defaults of transformers are not the released values, so sizes must be there. Follows the file in all else: a
    v4 file (`rope_theta`, `rope_scaling`) and a v5 file (`rope_parameters`) give the same configuration.

    Args:
        file: what messages call it.
        vision: False takes the text model alone of a file that has both.

    Raises:
        CheckpointError: naming every key that is missing, unknown, malformed or asks for what the core does not do.
    """
    problems: list[str] = []
    if "text_config" not in data:
        config = _text(Fields(data, f"{file}: ", problems))
    else:
        top = Fields(data, f"{file}: ", problems)
        top.only("model_type", "llama4")
        _common(top)
        config = _text(_part(top, "text_config"))
        if vision:
            config.vision = vision_config.from_fields(_part(top, "vision_config"), top.number("image_token_index"))
        top.rest(_INERT_ABOVE | _IMAGE_TOKENS.keys() | {"vision_config", "image_token_index"})
    if problems:
        raise CheckpointError("\n".join(problems))
    _warn_about_old_scout(config, file)
    return config


def is_quantized(data: dict[str, Any]) -> bool:
    """Whether a parsed `config.json` says that weights are stored in FP8 with scales beside them."""
    text = data.get("text_config")
    return bool(data.get("quantization_config") or (isinstance(text, dict) and text.get("quantization_config")))


def _part(top: Fields, key: str) -> Fields:
    value = top.get(key)
    if not isinstance(value, dict):
        top.fault(key, "is missing" if value is None else f"is {value!r}; it must be an object")
        return Fields({}, f"{top.where}{key}.", [])  # that it is not there is all that need be said
    return Fields(value, f"{top.where}{key}.", top.problems)


def _common(fields: Fields) -> None:
    """What may stand beside or inside text_config."""
    fields.only("tie_word_embeddings", False)
    quantization = fields.get("quantization_config")
    if not quantization:
        return
    if not isinstance(quantization, dict):
        fields.fault("quantization_config", f"is {quantization!r}; it must be an object or null")
        return
    inner = Fields(quantization, f"{fields.where}quantization_config.", fields.problems)
    for key, allowed in (("quant_method", "compressed-tensors"), ("format", "float-quantized")):
        if (value := inner.get(key)) != allowed:
            inner.fault(key, f"is {value!r}; only {allowed!r} is supported")
            return


def _text(text: Fields) -> ModelConfig:
    for key, allowed in (
        ("model_type", "llama4_text"),
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("attention_dropout", 0.0),
    ):
        text.only(key, allowed)
    _common(text)
    heads, size = text.number("num_attention_heads"), text.number("hidden_size")
    theta, scaling = _rope(text)
    eos = text.get("eos_token_id")
    config = ModelConfig(
        vocab_size=text.number("vocab_size"),
        hidden_size=size,
        layers=text.number("num_hidden_layers"),
        heads=heads,
        kv_heads=text.number("num_key_value_heads", null=True) or heads,
        head_dim=text.number("head_dim", null=True) or size // max(heads, 1),
        expert_hidden=text.number("intermediate_size"),
        dense_hidden=text.number("intermediate_size_mlp"),
        experts=text.number("num_local_experts"),
        active_experts=text.number("num_experts_per_tok"),
        moe_step=text.number("interleave_moe_layer_step", 1),
        nope_step=text.number("no_rope_layer_interval", 4),
        # Absent, it is what both transformers and the released files have; only a written null is "no chunks".
        chunk_size=text.number("attention_chunk_size", 8192, null=True),
        qk_norm=text.truth("use_qk_norm", True),
        temperature_tuning=text.truth("attn_temperature_tuning", True),
        floor_scale=text.number("floor_scale", 8192.0, float),
        attn_scale=text.number("attn_scale", 0.1, float),
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=text.number("max_position_embeddings"),
        norm_eps=text.number("rms_norm_eps", kind=float),
        init_std=text.number("initializer_range", 0.02, float),
        bos_id=text.number("bos_token_id", None),
        eos_ids=text.integers("eos_token_id") or [] if isinstance(eos, list) else _one(text, "eos_token_id"),
        pad_id=text.number("pad_token_id", None),
    )
    # Explicit lists that say what the steps say are left out; an empty no_rope_layers means "derive".
    moe, rope = text.integers("moe_layers"), text.integers("no_rope_layers") or None
    if moe is not None and moe != moe_layers(config):
        config.moe_layers = moe
    if rope is not None and [bool(r) for r in rope] != rope_layers(config):
        config.rope_layers = [bool(r) for r in rope]
    types = text.get("layer_types")
    if not text.faults:  # else a stand-in would be held against what is sound
        for problem in _misfits(config, types):
            text.problems.append(text.where + problem)
    text.rest(_INERT)
    return config


def _one(fields: Fields, key: str) -> list[int]:
    value = fields.number(key, None)
    return [] if value is None else [value]


def _rope(text: Fields) -> tuple[float, RopeScaling | None]:
    above = text.get("rope_theta")
    found = []
    for spelling in ("rope_parameters", "rope_scaling"):
        value = text.get(spelling)
        if isinstance(value, dict):
            value = ({} if above is None else {"rope_theta": above}) | value
            found.append(_one_rope(Fields(value, f"{text.where}{spelling}.", text.problems)))
        elif value is not None:
            text.fault(spelling, f"is {value!r}; it must be an object or null")
    if not found:
        return text.number("rope_theta", kind=float), None
    if found[0] != found[-1]:
        text.fault("rope_parameters", "and rope_scaling are both there and disagree; keep one")
    return found[0]


def _one_rope(rope: Fields) -> tuple[float, RopeScaling | None]:
    theta = rope.number("rope_theta", kind=float)
    spelt = rope.get("rope_type"), rope.get("type")
    kind = spelt[0] or spelt[1] or "default"
    rope.only("partial_rotary_factor", 1.0)
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if kind == "default":
        rope.rest(frozenset(keys))
        return theta, None
    if kind != "llama3":
        rope.fault("rope_type", f"is {kind!r}; allowed: 'default', 'llama3'")
        return theta, None
    factor, low, high, original = (rope.number(key, kind=float) for key in keys)
    rope.rest(frozenset())
    if not (factor > 0 and 0 < low <= high and original >= 1):
        rope.fault("factor", f"is {factor}, low {low}, high {high}, original {original}; positive, low at most high")
    return theta, RopeScaling(factor, low, high, int(original))


def _misfits(config: ModelConfig, layer_types: Any) -> Iterator[str]:
    """Sizes that cannot be built together."""
    small = False
    for key, value in (
        ("num_attention_heads", config.heads),
        ("num_key_value_heads", config.kv_heads),
        ("head_dim", config.head_dim),
        ("hidden_size", config.hidden_size),
        ("num_hidden_layers", config.layers),
        ("vocab_size", config.vocab_size),
        ("intermediate_size", config.expert_hidden),
        ("intermediate_size_mlp", config.dense_hidden),
        ("max_position_embeddings", config.max_positions),
    ):
        if value < 1:
            small = True
            yield f"{key} is {value}; it must be at least 1"
    if small:
        return
    for key, number in (
        ("rms_norm_eps", config.norm_eps),
        ("rope_theta", config.rope_theta),
        ("floor_scale", config.floor_scale),
    ):
        if number <= 0:
            yield f"{key} is {number}; it must be positive"
    if config.heads % config.kv_heads:
        yield (
            f"num_attention_heads is {config.heads}; it must be a multiple of num_key_value_heads, {config.kv_heads}"
        )
    if config.head_dim % 2:
        yield f"head_dim is {config.head_dim}; RoPE rotates pairs, so it must be even"
    if moe_layers(config) and not 1 <= config.active_experts <= config.experts:
        yield f"num_experts_per_tok is {config.active_experts}; allowed: 1 to num_local_experts, {config.experts}"
    if config.moe_layers is not None and not set(config.moe_layers) <= set(range(config.layers)):
        yield f"moe_layers is {config.moe_layers}; allowed: 0 to {config.layers - 1}"
    for key, value in (("interleave_moe_layer_step", config.moe_step), ("no_rope_layer_interval", config.nope_step)):
        if value < 0:
            yield f"{key} is {value}; at least 0"
    if config.chunk_size is not None and config.chunk_size < 1:
        yield f"attention_chunk_size is {config.chunk_size}; a positive number or null"
    rope = rope_layers(config)
    if len(rope) != config.layers:
        yield f"no_rope_layers has {len(rope)} entries; one for each of num_hidden_layers, {config.layers}"
    if layer_types not in (None, ["chunked_attention" if rotates else "full_attention" for rotates in rope]):
        yield "layer_types disagrees with no_rope_layers; only chunked RoPE and full NoPE layers exist"


def _warn_about_old_scout(config: ModelConfig, file: str) -> None:
    scaling = config.rope_scaling
    scout = (config.hidden_size, config.layers, config.experts) == (5120, 48, 16)
    if scout and scaling is not None and (scaling.factor, scaling.high_freq_factor) == (8.0, 4.0):
        warnings.warn(
            f"{file}: RoPE scaling 8 / 4 is what Scout was first shipped with by mistake; the corrected files say "
            "16 / 1. The file is followed.",
            stacklevel=3,
        )


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """A `config.json` that transformers (5.x) loads as the same model.

    `Llama4ForCausalLM` without sight, `Llama4ForConditionalGeneration` with it.

    Raises:
        CheckpointError: naming what the format cannot hold.
    """
    problems = [] if float(config.floor_scale).is_integer() else [f"floor_scale is {config.floor_scale}; whole only"]
    problems += [] if config.vision is None else [f"vision: {p}" for p in vision_config.misfits(config.vision)]
    if problems:
        raise CheckpointError("\n".join(f"the model does not fit the Hugging Face format: {p}" for p in problems))
    text = _text_to_json(config)
    if config.vision is None:
        return {"architectures": ["Llama4ForCausalLM"], **text}
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        **_IMAGE_TOKENS,
        "image_token_index": config.vision.image_token_id,
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": vision_config.to_json(config.vision),
    }


def _text_to_json(config: ModelConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(config.rope_theta)}
    if config.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": float(config.rope_scaling.factor),
            "low_freq_factor": float(config.rope_scaling.low_freq_factor),
            "high_freq_factor": float(config.rope_scaling.high_freq_factor),
            "original_max_position_embeddings": config.rope_scaling.original_positions,
        }
    return {
        "model_type": "llama4_text",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.expert_hidden,
        "intermediate_size_mlp": config.dense_hidden,
        "num_local_experts": config.experts,
        "num_experts_per_tok": config.active_experts,
        "interleave_moe_layer_step": config.moe_step,
        "moe_layers": moe_layers(config),
        # transformers divides by the interval even where the list is given.
        "no_rope_layer_interval": config.nope_step or config.layers + 1,
        "no_rope_layers": [int(rotates) for rotates in rope_layers(config)],
        # transformers cannot take null; a chunk of all positions is the same model.
        "attention_chunk_size": config.chunk_size or config.max_positions,
        "use_qk_norm": config.qk_norm,
        "attn_temperature_tuning": config.temperature_tuning,
        # transformers refuses a float here.
        "floor_scale": int(config.floor_scale),
        "attn_scale": float(config.attn_scale),
        "rope_parameters": rope,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": float(config.norm_eps),
        "initializer_range": float(config.init_std),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        **token_ids(config),
    }


def token_ids(config: ModelConfig) -> dict[str, Any]:
    """The special tokens as transformers spells them; a single eos is a number."""
    eos = config.eos_ids
    return {
        "bos_token_id": config.bos_id,
        "eos_token_id": list(eos) if len(eos) > 1 else eos[0] if eos else None,
        "pad_token_id": config.pad_id,
    }
