"""Which layers are MoE and which rotate, from the two spellings that a `ModelConfig` allows for each."""

from __future__ import annotations

from distill.config.schema import ModelConfig


def moe_layers(config: ModelConfig) -> list[int]:
    """Indices of the MoE layers: as listed, or the last layer of every group of `moe_step` (0: none)."""
    if config.moe_layers is not None:
        return sorted(set(config.moe_layers))
    return list(range(config.moe_step - 1, config.layers, config.moe_step)) if config.moe_step else []


def rope_layers(config: ModelConfig) -> list[bool]:
    """Per layer, whether it rotates: as listed, or all but the last of every `nope_step` layers (0: all)."""
    if config.rope_layers:
        return [bool(rotates) for rotates in config.rope_layers]
    return [not config.nope_step or (layer + 1) % config.nope_step != 0 for layer in range(config.layers)]
