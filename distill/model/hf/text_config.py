"""`config.json` of the Llama 4 family, in all its spellings, to and from a `ModelConfig`."""

import dataclasses
import warnings
from typing import Any

from distill.config.errors import CheckpointError
from distill.config.model import ModelConfig, model_rules, moe_layers, rope_layers
from distill.model.hf import vision_config
from distill.model.hf.config_fields import Fields, rope

_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "expert_hidden": "intermediate_size",
    "dense_hidden": "intermediate_size_mlp",
    "experts": "num_local_experts",
    "active_experts": "num_experts_per_tok",
    "max_positions": "max_position_embeddings",
}
"""Whole numbers that a file must have: the class defaults of transformers are not the released values."""
_KEYS = _SIZES | {
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "moe_step": "interleave_moe_layer_step",
    "moe_layers": "moe_layers",
    "nope_step": "no_rope_layer_interval",
    "rope_layers": "no_rope_layers",
    "chunk_size": "attention_chunk_size",
    "qk_norm": "use_qk_norm",
    "temperature_tuning": "attn_temperature_tuning",
    "floor_scale": "floor_scale",
    "attn_scale": "attn_scale",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
    "bos_id": "bos_token_id",
    "eos_ids": "eos_token_id",
    "pad_id": "pad_token_id",
}
_FIXED = {"model_type": "llama4_text", "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0}
"""Keys that have one value in all models of the family."""
_INERT = frozenset(("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"))
"""Keys of text_config that transformers never reads for the logits."""
_INERT_ABOVE = frozenset(("bos_token_id", "eos_token_id", "pad_token_id", "vision_feature_layer"))
"""Keys beside text_config that repeat it."""
_IMAGE_TOKENS = {"boi_token_index": 200080, "eoi_token_index": 200081}
"""Around an image, as released; they are in the text, and no model computes with them."""


def config_from_json(data: dict[str, Any], file: str = "config.json", vision: bool = True) -> ModelConfig:
    """The model of a parsed `config.json`: text alone, or text_config and vision_config.

    A v4 file (`rope_theta`, `rope_scaling`) and a v5 file (`rope_parameters`) give the same configuration.

    Args:
        file: its name in messages.
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
            tower = vision_config.from_fields(_part(top, "vision_config"))
            tower = dataclasses.replace(tower, image_token_id=top.number("image_token_index"))
            config = dataclasses.replace(config, vision=tower)
        top.rest(_INERT_ABOVE | _IMAGE_TOKENS.keys() | {"vision_config", "image_token_index"})
    if problems:
        raise CheckpointError("\n".join(problems))
    _warn_about_old_scout(config, file)
    return config


def is_quantized(data: dict[str, Any]) -> bool:
    """Whether the weights of a parsed `config.json` are stored in FP8 with scales beside them."""
    text = data.get("text_config")
    return bool(data.get("quantization_config") or (isinstance(text, dict) and text.get("quantization_config")))


def _part(top: Fields, key: str) -> Fields:
    value = top.get(key)
    if not isinstance(value, dict):
        top.fault(key, "is missing" if value is None else f"is {value!r}; it must be an object")
        return Fields({}, f"{top.where}{key}.", [])  # faults of what is missing are not noted
    return Fields(value, f"{top.where}{key}.", top.problems)


def _common(fields: Fields) -> None:
    """Keys that files have beside text_config or inside it."""
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
    for key, allowed in _FIXED.items():
        text.only(key, allowed)
    _common(text)
    sizes = {name: text.number(key) for name, key in _SIZES.items()}
    theta, scaling = rope(text, ["rope_parameters", "rope_scaling"], ["default", "llama3"])
    several = isinstance(text.get("eos_token_id"), list)
    eos = text.integers("eos_token_id") if several else [text.number("eos_token_id", None)]
    config = ModelConfig(
        **sizes,
        kv_heads=text.number("num_key_value_heads", null=True) or sizes["heads"],
        head_dim=text.number("head_dim", null=True) or sizes["hidden_size"] // max(sizes["heads"], 1),
        moe_step=text.number("interleave_moe_layer_step", 1),
        moe_layers=text.integers("moe_layers"),
        nope_step=text.number("no_rope_layer_interval", 4),
        rope_layers=[bool(rotates) for rotates in text.integers("no_rope_layers") or []] or None,
        # Absent, it is what both transformers and the released files have; only a written null is "no chunks".
        chunk_size=text.number("attention_chunk_size", 8192, null=True),
        qk_norm=text.truth("use_qk_norm", True),
        temperature_tuning=text.truth("attn_temperature_tuning", True),
        floor_scale=text.number("floor_scale", 8192.0, float),
        attn_scale=text.number("attn_scale", 0.1, float),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=text.number("rms_norm_eps", kind=float),
        init_std=text.number("initializer_range", 0.02, float),
        bos_id=text.number("bos_token_id", None),
        eos_ids=[token for token in eos or [] if token is not None],
        pad_id=text.number("pad_token_id", None),
    )
    text.check(config, model_rules, _KEYS)
    types = text.get("layer_types")
    if text.sound:
        kinds = ["chunked_attention" if rotates else "full_attention" for rotates in rope_layers(config)]
        if types not in (None, kinds):
            text.fault("layer_types", "disagrees with no_rope_layers; only chunked RoPE and full NoPE layers exist")
        derived = dataclasses.replace(config, moe_layers=None, rope_layers=None)
        config = dataclasses.replace(  # a list that repeats what the steps give is left out
            config,
            moe_layers=None if moe_layers(config) == moe_layers(derived) else config.moe_layers,
            rope_layers=None if rope_layers(config) == rope_layers(derived) else config.rope_layers,
        )
    text.rest(_INERT)
    return config


def _warn_about_old_scout(config: ModelConfig, file: str) -> None:
    scaling = config.rope_scaling
    scout = (config.hidden_size, config.layers, config.experts) == (5120, 48, 16)
    if scout and scaling is not None and (scaling.factor, scaling.high_freq_factor) == (8.0, 4.0):
        warnings.warn(
            f"{file}: RoPE scaling 8 / 4 is what Scout was first shipped with by mistake; the corrected files have "
            "16 / 1. The file is followed.",
            stacklevel=3,
        )


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """A `config.json` that transformers (5.x) loads as the same model.

    `Llama4ForCausalLM` without vision, `Llama4ForConditionalGeneration` with it.

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
        **_FIXED,
        "tie_word_embeddings": False,
        **{key: getattr(config, name) for name, key in _KEYS.items()},
        "moe_layers": moe_layers(config),
        # transformers divides by the interval even where the list is given.
        "no_rope_layer_interval": config.nope_step or config.layers + 1,
        "no_rope_layers": [int(rotates) for rotates in rope_layers(config)],
        # transformers cannot take null; a chunk of all positions is the same model.
        "attention_chunk_size": config.chunk_size or config.max_positions,
        # transformers accepts no float here, and no whole number in the next three.
        "floor_scale": int(config.floor_scale),
        "attn_scale": float(config.attn_scale),
        "rms_norm_eps": float(config.norm_eps),
        "initializer_range": float(config.init_std),
        "rope_parameters": rope,
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
