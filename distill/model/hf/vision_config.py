"""`vision_config` of a `config.json`, to and from a `VisionConfig`."""

from collections.abc import Iterator
from typing import Any

from distill.config.model import VisionConfig, vision_rules
from distill.model.hf.config_fields import Fields, rope

_KEYS = {
    "hidden_size": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_hidden": "intermediate_size",
    "tile_size": "image_size",
    "patch_size": "patch_size",
    "adapter_hidden": "projector_input_dim",
    "adapter_out": "projector_output_dim",
}
"""Fields that both spell otherwise but mean alike."""
_NAMES = _KEYS | {"shuffle": "(1 / pixel_shuffle_ratio)"}
_FIXED = {
    "model_type": "llama4_vision_model",
    "hidden_act": "gelu",
    "num_channels": 3,
    "attention_dropout": 0.0,
    "projector_dropout": 0.0,
    "multi_modal_projector_bias": False,
}
"""Keys that have one value in all models of the family."""
_INERT = {
    "initializer_range": 0.02,
    "norm_eps": 1e-5,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
}
"""Keys that change nothing: transformers computes with 1e-5 whatever norm_eps is."""


def from_fields(vision: Fields) -> VisionConfig:
    """The vision of a file, with the released id of image tokens; faults are noted in `vision.problems`."""
    for key, allowed in _FIXED.items():
        vision.only(key, allowed)
    vision.only("rope_scaling", None)
    ratio = vision.number("pixel_shuffle_ratio", kind=float)
    shuffle = round(1 / ratio) if 0 < ratio <= 1 else 0
    if not shuffle or abs(shuffle * ratio - 1) > 1e-6:
        vision.fault("pixel_shuffle_ratio", f"is {ratio}; allowed: 1 / n for a whole n")
    sides = {"tile_size", "patch_size"}
    sizes = {name: (vision.side if name in sides else vision.number)(key) for name, key in _KEYS.items()}
    config = VisionConfig(
        **sizes, shuffle=shuffle, rope_theta=rope(vision, ["rope_parameters"], ["default"]).theta, norm_eps=1e-5
    )
    out = vision.number("vision_output_dim")
    vision.check(config, vision_rules, _NAMES)
    if vision.sound and out != config.adapter_out:
        vision.fault("vision_output_dim", f"is {out}; it must be projector_output_dim, {config.adapter_out}")
    vision.rest(frozenset(_INERT))
    return config


def misfits(config: VisionConfig) -> Iterator[str]:
    """A sentence for each number that the format cannot hold."""
    yield from vision_rules(config, "", lambda name: _NAMES.get(name, name))
    if config.norm_eps != _INERT["norm_eps"]:
        yield f"norm_eps is {config.norm_eps}; transformers computes with {_INERT['norm_eps']}, not with the file's"


def to_json(config: VisionConfig) -> dict[str, Any]:
    """The object that transformers reads as the same tower."""
    return {
        **_FIXED,
        **{key: getattr(config, name) for name, key in _KEYS.items()},
        "pixel_shuffle_ratio": 1 / config.shuffle,
        "vision_output_dim": config.adapter_out,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(config.rope_theta)},
        **_INERT,
    }
