"""`vision_config` of a `config.json`, to and from a `VisionConfig`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from distill.config.schema import VisionConfig
from distill.model.hf.config_fields import Fields

_INERT = frozenset(("initializer_range", "norm_eps", "vision_feature_layer", "vision_feature_select_strategy"))
"""transformers takes 1e-5 whatever norm_eps says."""
_EPS = 1e-5


def from_fields(vision: Fields, image_token_id: int) -> VisionConfig:
    """The sight of a file; what is wrong with it is noted in `vision.problems`."""
    for key, allowed in (
        ("model_type", "llama4_vision_model"),
        ("hidden_act", "gelu"),
        ("num_channels", 3),
        ("attention_dropout", 0.0),
        ("projector_dropout", 0.0),
        ("multi_modal_projector_bias", False),
        ("rope_scaling", None),
    ):
        vision.only(key, allowed)
    ratio = vision.number("pixel_shuffle_ratio", kind=float)
    shuffle = round(1 / ratio) if 0 < ratio <= 1 else 0
    if not shuffle or abs(shuffle * ratio - 1) > 1e-6:
        vision.fault("pixel_shuffle_ratio", f"is {ratio}; allowed: 1 / n for a whole n")
        shuffle = 1
    config = VisionConfig(
        hidden_size=vision.number("hidden_size"),
        layers=vision.number("num_hidden_layers"),
        heads=vision.number("num_attention_heads"),
        mlp_hidden=vision.number("intermediate_size"),
        tile_size=vision.side("image_size"),
        patch_size=vision.side("patch_size"),
        shuffle=shuffle,
        adapter_hidden=vision.number("projector_input_dim"),
        adapter_out=vision.number("projector_output_dim"),
        rope_theta=_theta(vision),
        norm_eps=_EPS,
        image_token_id=image_token_id,
    )
    out = vision.number("vision_output_dim")
    if not vision.faults:  # else a stand-in would be held against what is sound
        for problem in (*_impossible(config), *misfits(config)):
            vision.problems.append(vision.where + problem)
        if out != config.adapter_out:
            vision.fault("vision_output_dim", f"is {out}; it must be projector_output_dim, {config.adapter_out}")
    vision.rest(_INERT)
    return config


def _theta(vision: Fields) -> float:
    above, rope = vision.get("rope_theta"), vision.get("rope_parameters")
    if not isinstance(rope, dict):
        if rope is not None:
            vision.fault("rope_parameters", f"is {rope!r}; it must be an object or null")
        return float(vision.number("rope_theta", kind=float))
    rope = ({} if above is None else {"rope_theta": above}) | rope
    inner = Fields(rope, f"{vision.where}rope_parameters.", vision.problems)
    inner.only("rope_type", "default")
    theta: float = inner.number("rope_theta", kind=float)
    inner.rest(frozenset())
    return theta


def _impossible(config: VisionConfig) -> Iterator[str]:
    """Sizes that cannot be built together."""
    for key, value in (
        ("hidden_size", config.hidden_size),
        ("num_hidden_layers", config.layers),
        ("num_attention_heads", config.heads),
        ("image_size", config.tile_size),
        ("patch_size", config.patch_size),
        ("projector_input_dim", config.adapter_hidden),
        ("projector_output_dim", config.adapter_out),
    ):
        if value < 1:
            yield f"{key} is {value}; it must be at least 1"
            return
    if config.hidden_size % (4 * config.heads):
        yield (
            f"hidden_size is {config.hidden_size}; it must be a multiple of 4 x num_attention_heads, "
            f"4 x {config.heads}: pairs of channels turn with the row or with the column"
        )
    if config.tile_size % (config.patch_size * config.shuffle):
        yield (
            f"image_size is {config.tile_size}; it must be a multiple of patch_size / pixel_shuffle_ratio, "
            f"{config.patch_size} x {config.shuffle}"
        )


def misfits(config: VisionConfig) -> Iterator[str]:
    """What the released layout cannot hold, though our model could be built so."""
    if config.mlp_hidden != config.hidden_size * config.shuffle**2:
        yield (
            f"intermediate_size is {config.mlp_hidden}; the format's adapter takes as many channels, so it must be "
            f"hidden_size / pixel_shuffle_ratio ** 2, {config.hidden_size * config.shuffle**2}"
        )
    if config.adapter_hidden != config.adapter_out:
        yield (
            f"projector_input_dim is {config.adapter_hidden} and projector_output_dim {config.adapter_out}; the format "
            "has one width for both"
        )
    if config.norm_eps != _EPS:
        yield f"norm_eps is {config.norm_eps}; transformers computes with {_EPS} whatever the file says"


def to_json(config: VisionConfig) -> dict[str, Any]:
    """The object that transformers reads as the same tower."""
    return {
        "model_type": "llama4_vision_model",
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_hidden,
        "num_channels": 3,
        "image_size": config.tile_size,
        "patch_size": config.patch_size,
        "pixel_shuffle_ratio": 1 / config.shuffle,
        "projector_input_dim": config.adapter_hidden,
        "projector_output_dim": config.adapter_out,
        "vision_output_dim": config.adapter_out,
        "projector_dropout": 0.0,
        "attention_dropout": 0.0,
        "multi_modal_projector_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(config.rope_theta)},
        "hidden_act": "gelu",
        "norm_eps": float(config.norm_eps),
        "initializer_range": 0.02,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }
