"""`config.json` of the Llama 4 family, both of its spellings, to and from a `ModelConfig`."""

from __future__ import annotations

import warnings
from typing import Any

from distill.config.errors import CheckpointError
from distill.config.schema import ModelConfig, RopeScaling
from distill.model.layout import moe_layers, rope_layers

_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "quantization_config": None,
}
"""Keys of which the core knows one value; released files carry them."""


def config_from_json(data: dict[str, Any], file: str = "config.json") -> ModelConfig:
    """The text model of a parsed `config.json`, nested under `text_config` or not.

    Class defaults of transformers are not the released values, so sizes must be there. Follows the file in all else:
    a v4 file (`rope_theta`, `rope_scaling`) and a v5 file (`rope_parameters`) give the same configuration.

    Args:
        file: what messages call it.

    Raises:
        CheckpointError: naming every key that is missing, malformed or asks for what the core does not do.
    """
    problems: list[str] = []
    text = data.get("text_config", data)
    if not isinstance(text, dict):
        raise CheckpointError(f"{file}: text_config is {text!r}; it must be an object")
    if text.get("model_type", "llama4_text") != "llama4_text":
        problems.append(f"{file}: model_type is {text['model_type']!r}; allowed: 'llama4_text'")
    for key, allowed in _ONLY.items():
        for level in (data, text) if text is not data else (text,):
            if level.get(key, allowed) != allowed:
                problems.append(f"{file}: {key} is {level[key]!r}; only {allowed!r} is supported")

    def number(key: str, default: Any = ..., kind: type = int) -> Any:
        value = text.get(key, default)
        if value is ...:
            problems.append(f"{file}: {key} is missing")
            return 1
        whole = kind is int and isinstance(value, float) and value.is_integer()
        if isinstance(value, bool) or not (
            isinstance(value, (int, kind)) or whole or (value is None and default is None)
        ):
            problems.append(f"{file}: {key} is {value!r}; it must be {'an integer' if kind is int else 'a number'}")
            return 1
        return value if value is None else kind(value)

    def listed(key: str) -> list[int] | None:
        value = text.get(key)
        if value is None or (isinstance(value, list) and all(isinstance(item, int) for item in value)):
            return value
        problems.append(f"{file}: {key} is {value!r}; it must be a list of integers or null")
        return None

    heads, size = number("num_attention_heads"), number("hidden_size")
    theta, scaling = _rope(text, file, problems)
    eos = text.get("eos_token_id")
    config = ModelConfig(
        vocab_size=number("vocab_size"),
        hidden_size=size,
        layers=number("num_hidden_layers"),
        heads=heads,
        kv_heads=number("num_key_value_heads", None) or heads,
        head_dim=number("head_dim", None) or size // max(heads, 1),
        expert_hidden=number("intermediate_size"),
        dense_hidden=number("intermediate_size_mlp"),
        experts=number("num_local_experts"),
        active_experts=number("num_experts_per_tok"),
        moe_step=number("interleave_moe_layer_step", 1),
        nope_step=number("no_rope_layer_interval", 4),
        chunk_size=number("attention_chunk_size", None),
        qk_norm=bool(text.get("use_qk_norm", True)),
        # Early files hold the integer 4 where a truth value is meant.
        temperature_tuning=bool(text.get("attn_temperature_tuning", True)),
        floor_scale=number("floor_scale", 8192.0, float),
        attn_scale=number("attn_scale", 0.1, float),
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=number("max_position_embeddings"),
        norm_eps=number("rms_norm_eps", kind=float),
        init_std=number("initializer_range", 0.02, float),
        bos_id=number("bos_token_id", None),
        eos_ids=listed("eos_token_id") or [] if isinstance(eos, list) else [eos] if eos is not None else [],
        pad_id=number("pad_token_id", None),
    )
    # Explicit lists that say what the steps say are left out; an empty no_rope_layers means "derive".
    moe, rope = listed("moe_layers"), listed("no_rope_layers") or None
    if moe is not None and moe != moe_layers(config):
        config.moe_layers = moe
    if rope is not None and [bool(r) for r in rope] != rope_layers(config):
        config.rope_layers = [bool(r) for r in rope]
    problems += _misfits(config, text, file)
    if problems:
        raise CheckpointError("\n".join(problems))
    _warn_about_old_scout(config, file)
    return config


def _rope(text: dict[str, Any], file: str, problems: list[str]) -> tuple[float, RopeScaling | None]:
    spelling = "rope_parameters" if text.get("rope_parameters") else "rope_scaling"
    rope = text.get(spelling) or {}
    theta = rope.get("rope_theta", text.get("rope_theta"))
    if isinstance(theta, bool) or not isinstance(theta, (int, float)):
        problems.append(f"{file}: rope_theta is {'missing' if theta is None else repr(theta)}; it must be a number")
        theta = 1.0
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        problems.append(f"{file}: {spelling}.rope_type is {kind!r}; allowed: 'default', 'llama3'")
        return float(theta), None
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    bad = [key for key in keys if isinstance(rope.get(key), bool) or not isinstance(rope.get(key), (int, float))]
    problems += [f"{file}: {spelling}.{key} is {rope.get(key)!r}; it must be a number" for key in bad]
    if bad:
        return float(theta), None
    factor, low, high, original = (rope[key] for key in keys)
    return float(theta), RopeScaling(float(factor), float(low), float(high), int(original))


def _misfits(config: ModelConfig, text: dict[str, Any], file: str) -> list[str]:
    """Sizes that cannot be built together."""
    problems = []
    for key in ("heads", "kv_heads", "head_dim", "hidden_size", "layers", "vocab_size", "expert_hidden"):
        if getattr(config, key) < 1:
            problems.append(f"{file}: {key} is {getattr(config, key)}; it must be at least 1")
    if config.kv_heads > 0 and config.heads % config.kv_heads:
        problems.append(f"{file}: {config.heads} attention heads are no multiple of {config.kv_heads} key/value heads")
    if config.head_dim % 2:
        problems.append(f"{file}: head_dim is {config.head_dim}; RoPE rotates pairs, so it must be even")
    if moe_layers(config) and not 1 <= config.active_experts <= config.experts:
        problems.append(f"{file}: num_experts_per_tok is {config.active_experts} of {config.experts} experts")
    if config.moe_layers is not None and not set(config.moe_layers) <= set(range(config.layers)):
        problems.append(f"{file}: moe_layers names layers outside 0 to {config.layers - 1}: {config.moe_layers}")
    if config.chunk_size is not None and config.chunk_size < 1:
        problems.append(f"{file}: attention_chunk_size is {config.chunk_size}; a positive number or null")
    rope = rope_layers(config)
    if len(rope) != config.layers:
        problems.append(f"{file}: no_rope_layers has {len(rope)} entries for {config.layers} layers")
    types = ["chunked_attention" if rotates else "full_attention" for rotates in rope]
    if text.get("layer_types") not in (None, types):
        problems.append(
            f"{file}: layer_types disagrees with no_rope_layers; only chunked RoPE and full NoPE layers exist"
        )
    return problems


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
    """A `config.json` that transformers (5.x, `Llama4ForCausalLM`) loads as the same model."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(config.rope_theta)}
    if config.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": float(config.rope_scaling.factor),
            "low_freq_factor": float(config.rope_scaling.low_freq_factor),
            "high_freq_factor": float(config.rope_scaling.high_freq_factor),
            "original_max_position_embeddings": config.rope_scaling.original_positions,
        }
    floor_scale = float(config.floor_scale)
    return {
        "architectures": ["Llama4ForCausalLM"],
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
        "floor_scale": int(floor_scale) if floor_scale.is_integer() else floor_scale,
        "attn_scale": float(config.attn_scale),
        "rope_parameters": rope,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": float(config.norm_eps),
        "initializer_range": float(config.init_std),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids),
        "pad_token_id": config.pad_id,
    }
