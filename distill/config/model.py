"""Configuration of the Transformer, text and vision: types, defaults and meaning. Part of the schema; no torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

MISSING: Any = "???"
"""Omegaconf's word for a value that must be given; spelt out, since loading that library takes longer than a tool."""


class Parametrization(Enum):
    standard = "standard"
    transfer = "transfer"


@dataclass
class RopeScaling:
    """llama3 frequency scaling; low == high is a hard step without a smooth band."""

    factor: float = 16.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_positions: int = 8192


@dataclass
class VisionConfig:
    """The vision tower, its adapter and the projector into the text model; defaults are the released values.

    Names of the released `config.json` are given where ours differ.
    """

    hidden_size: int = 1408
    layers: int = 34
    heads: int = 16
    mlp_hidden: int = 5632
    """Width of the tower's feed-forward (intermediate_size)."""
    tile_size: int = 336
    """Height and width of a tile in pixels (image_size)."""
    patch_size: int = 14
    shuffle: int = 2
    """Patches on a side that become one token (1 / pixel_shuffle_ratio)."""
    adapter_hidden: int = 4096
    """Width between the adapter's two layers (projector_input_dim)."""
    adapter_out: int = 4096
    """Width that the projector takes (projector_output_dim, vision_output_dim)."""
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    image_token_id: int = 200092
    """Id of a position that an image fills (image_token_index, `<|patch|>`)."""

    @property
    def tile_tokens(self) -> int:
        """Tokens that one tile becomes."""
        return (self.tile_size // self.patch_size // self.shuffle) ** 2


@dataclass
class BaseSizes:
    """Sizes of the model for which learning rate and `init_std` were chosen (parametrization=transfer)."""

    hidden_size: int = 128
    layers: int = 4
    expert_hidden: int = 128
    dense_hidden: int = 256


@dataclass
class ModelConfig:
    """One Transformer of the Llama 4 family: teacher and student differ only in these numbers.

    Names of the released `config.json` are given where ours differ.
    """

    vocab_size: int = MISSING
    """Rows of the embedding and the head; may exceed the tokenizer's (padding ids are never targets)."""
    hidden_size: int = MISSING
    layers: int = MISSING
    heads: int = MISSING
    """Query heads H (num_attention_heads)."""
    kv_heads: int = MISSING
    """Key/value heads G (num_key_value_heads)."""
    head_dim: int = MISSING
    expert_hidden: int = MISSING
    """Width F of each routed expert and of the shared expert (intermediate_size)."""
    dense_hidden: int = MISSING
    """Width of the dense layers' feed-forward (intermediate_size_mlp)."""
    experts: int = MISSING
    """Routed experts E (num_local_experts)."""
    active_experts: int = 1
    """Routed experts per token A (num_experts_per_tok)."""
    moe_step: int = 1
    """Every moe_step-th layer is MoE, the last of each group (interleave_moe_layer_step); 0: none."""
    moe_layers: list[int] | None = None
    """Explicit indices of the MoE layers; null derives them from moe_step."""
    nope_step: int = 4
    """Every nope_step-th layer has no positional embedding (no_rope_layer_interval); 0: all layers have RoPE."""
    rope_layers: list[bool] | None = None
    """Per layer, true where RoPE is applied (no_rope_layers, which is inverted); null derives from nope_step."""
    chunk_size: int | None = 8192
    """RoPE layers attend within chunks of this many positions (attention_chunk_size); null: full causal."""
    qk_norm: bool = True
    """Weightless RMS norm of q and k after RoPE, RoPE layers only (use_qk_norm)."""
    temperature_tuning: bool = True
    """Scale queries of NoPE layers with position (attn_temperature_tuning)."""
    floor_scale: float = 8192.0
    attn_scale: float = 0.1
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    max_positions: int = 262144
    norm_eps: float = 1e-5
    init_std: float = 0.02
    """Standard deviation of every initial weight matrix (initializer_range)."""
    bos_id: int | None = 200000
    eos_ids: list[int] = field(default_factory=lambda: [200001])
    pad_id: int | None = 200018
    vision: VisionConfig | None = None
    """Sight by early fusion; null: text alone."""
    parametrization: Parametrization = Parametrization.standard
    """How initial scales and learning rates follow the sizes: not at all, or so that one learning rate fits all.

    Of transfer: head_dim and the share of active experts must be those of the base model; heads grow with hidden_size.
    """
    base: BaseSizes = field(default_factory=BaseSizes)
