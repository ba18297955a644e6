"""Configuration of the Transformer, text and vision: fields, defaults, and the rules between them. No torch here."""

from collections.abc import Callable, Iterator
from dataclasses import field
from enum import Enum
from typing import Any

from distill.config.immutable import frozen
from distill.config.ranges import Count, Every, Id, Ids, Layers, Natural, NotNegative, Positive, Size

MISSING: Any = "???"
"""Omegaconf's word for a value that must be given; spelt out, since loading that library takes longer than a tool."""


class Parametrization(Enum):
    standard = "standard"
    transfer = "transfer"


@frozen
class RopeScaling:
    """llama3 frequency scaling; low == high is a hard step without a smooth band."""

    factor: Positive = 16.0
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 1.0
    original_positions: Count = 8192


@frozen
class VisionConfig:
    """The vision tower, its adapter and the projector into the text model; defaults are the released values.

    Names of the released `config.json` are given where ours differ.
    """

    hidden_size: Size = 1408
    layers: Layers = 34
    heads: Size = 16
    mlp_hidden: Size = 5632
    """Width of the tower's feed-forward (intermediate_size)."""
    tile_size: Size = 336
    """Height and width of a tile in pixels (image_size)."""
    patch_size: Size = 14
    shuffle: Size = 2
    """Patches on a side that become one token (1 / pixel_shuffle_ratio)."""
    adapter_hidden: Size = 4096
    """Width between the adapter's two layers (projector_input_dim)."""
    adapter_out: Size = 4096
    """Width that the projector takes (projector_output_dim, vision_output_dim)."""
    rope_theta: Positive = 10000.0
    norm_eps: Positive = 1e-5
    image_token_id: Id = 200092
    """Id of a position that an image fills (image_token_index, `<|patch|>`)."""

    @property
    def tile_tokens(self) -> int:
        """Tokens that one tile becomes."""
        return (self.tile_size // self.patch_size // self.shuffle) ** 2


@frozen
class BaseSizes:
    """Sizes of the model for which learning rate and `init_std` were chosen (parametrization=transfer)."""

    hidden_size: Size = 128
    layers: Layers = 4
    expert_hidden: Size = 128
    dense_hidden: Size = 256


@frozen
class ModelConfig:
    """One Transformer of the Llama 4 family: teacher and student differ only in these numbers.

    Names of the released `config.json` are given where ours differ.
    """

    vocab_size: Ids = MISSING
    """Rows of the embedding and the head; may exceed the tokenizer's (padding ids are never targets)."""
    hidden_size: Size = MISSING
    layers: Layers = MISSING
    heads: Size = MISSING
    """Query heads H (num_attention_heads)."""
    kv_heads: Size = MISSING
    """Key/value heads G (num_key_value_heads)."""
    head_dim: Size = MISSING
    expert_hidden: Size = MISSING
    """Width F of each routed expert and of the shared expert (intermediate_size)."""
    dense_hidden: Size = MISSING
    """Width of the dense layers' feed-forward (intermediate_size_mlp)."""
    experts: Natural = MISSING
    """Routed experts E (num_local_experts)."""
    active_experts: Natural = 1
    """Routed experts per token A (num_experts_per_tok)."""
    moe_step: Every = 1
    """Every moe_step-th layer is MoE, the last of each group (interleave_moe_layer_step); 0: none."""
    moe_layers: list[Every] | None = None
    """Explicit indices of the MoE layers; null derives them from moe_step."""
    nope_step: Every = 4
    """Every nope_step-th layer has no positional embedding (no_rope_layer_interval); 0: all layers have RoPE."""
    rope_layers: list[bool] | None = None
    """Per layer, true where RoPE is applied (no_rope_layers, which is inverted); null derives from nope_step."""
    chunk_size: Count | None = 8192
    """RoPE layers attend within chunks of this many positions (attention_chunk_size); null: full causal."""
    qk_norm: bool = True
    """Weightless RMS norm of q and k after RoPE, RoPE layers only (use_qk_norm)."""
    temperature_tuning: bool = True
    """Scale queries of NoPE layers with position (attn_temperature_tuning)."""
    floor_scale: Positive = 8192.0
    attn_scale: NotNegative = 0.1
    rope_theta: Positive = 500000.0
    rope_scaling: RopeScaling | None = None
    max_positions: Count = 262144
    norm_eps: Positive = 1e-5
    init_std: Positive = 0.02
    """Standard deviation of every initial weight matrix (initializer_range)."""
    bos_id: Id | None = 200000
    eos_ids: list[Id] = field(default_factory=lambda: [200001])
    pad_id: Id | None = 200018
    vision: VisionConfig | None = None
    """Vision by early fusion; null: text alone."""
    parametrization: Parametrization = Parametrization.standard
    """How initial scales and learning rates follow the sizes: not at all, or so that one learning rate fits all.

    Of transfer: head_dim and the share of active experts must be those of the base model; heads grow with hidden_size.
    """
    base: BaseSizes = field(default_factory=BaseSizes)


def moe_layers(m: ModelConfig) -> list[int]:
    """Indices of the MoE layers: as listed, or the last layer of every group of `moe_step` (0: none)."""
    if m.moe_layers is not None:
        return sorted(set(m.moe_layers))
    return list(range(m.moe_step - 1, m.layers, m.moe_step)) if m.moe_step else []


def has_moe(m: ModelConfig) -> bool:
    """Whether any layer is MoE, also of models whose layers no list can hold."""
    return 0 < m.moe_step <= m.layers if m.moe_layers is None else bool(m.moe_layers)


def rope_layers(m: ModelConfig) -> list[bool]:
    """Whether each layer has RoPE: as listed, or all but the last of every `nope_step` layers (0: all)."""
    if m.rope_layers:
        return [bool(rotates) for rotates in m.rope_layers]
    return [not m.nope_step or (layer + 1) % m.nope_step != 0 for layer in range(m.layers)]


def model_rules(m: ModelConfig, where: str, name: Callable[[str], str] = str) -> Iterator[str]:
    """A sentence for each rule between fields that a model breaks; ranges are checked apart (distill/config/ranges.py).

    Args:
        where: what a sentence puts before its key, such as `teacher.model.`.
        name: how the user's file spells a field.
    """
    if m.heads % max(m.kv_heads, 1):
        yield f"{where}{name('heads')} is {m.heads}; it must be a multiple of {name('kv_heads')}, {m.kv_heads}"
    if m.head_dim % 2:
        yield f"{where}{name('head_dim')} is {m.head_dim}; RoPE rotates pairs, so it must be even"
    if has_moe(m) and not 1 <= m.active_experts <= m.experts:
        yield f"{where}{name('active_experts')} is {m.active_experts}; allowed: 1 to {name('experts')}, {m.experts}"
    for layer in m.moe_layers or []:
        if not 0 <= layer < m.layers:
            yield f"{where}{name('moe_layers')} has {layer}; allowed: 0 to {m.layers - 1}"
    if m.rope_layers and len(m.rope_layers) != m.layers:
        yield (
            f"{where}{name('rope_layers')} has {len(m.rope_layers)} entries; one for each of {name('layers')}, "
            f"{m.layers}, or null"
        )
    if m.rope_scaling is not None:
        yield from scaling_rules(m.rope_scaling, f"{where}{name('rope_scaling')}.")


def width_rules(m: ModelConfig, where: str, multiple: int, precision: str) -> Iterator[str]:
    """A sentence for each width that the products of a precision do not take, of projections and experts."""
    has_dense = m.moe_step != 1 if m.moe_layers is None else len(set(m.moe_layers)) < m.layers
    widths = {
        "hidden_size": m.hidden_size,
        "expert_hidden": m.expert_hidden if has_moe(m) else 0,
        "dense_hidden": m.dense_hidden if has_dense else 0,
    }
    for name, width in widths.items():
        if width % multiple:
            yield f"{where}{name} is {width}; products of {precision} take multiples of {multiple}"
    for name, heads in (("heads", m.heads), ("kv_heads", m.kv_heads)):
        if heads * m.head_dim % multiple:
            yield (
                f"{where}{name} is {heads}, {heads} x {m.head_dim} with head_dim; products of {precision} take "
                f"multiples of {multiple}"
            )


def scaling_rules(scaling: RopeScaling, where: str, name: Callable[[str], str] = str) -> Iterator[str]:
    """The same for the scaling of RoPE."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if low > high:
        yield f"{where}{name('low_freq_factor')} is {low}; at most {name('high_freq_factor')}, {high}"


def vision_rules(v: VisionConfig, where: str, name: Callable[[str], str] = str) -> Iterator[str]:
    """The same for vision."""
    if min(v.hidden_size, v.heads, v.tile_size, v.patch_size, v.shuffle) < 1:  # the rules below divide by them
        return
    shuffle = name("shuffle")
    if v.hidden_size % (4 * v.heads):
        yield (
            f"{where}{name('hidden_size')} is {v.hidden_size}; it must be a multiple of 4 x {name('heads')}, "
            f"{4 * v.heads}: RoPE turns pairs of a head's channels, half of them by column and half by row"
        )
    if v.tile_size % (v.patch_size * v.shuffle):
        yield (
            f"{where}{name('tile_size')} is {v.tile_size}; it must be a multiple of {name('patch_size')} x {shuffle}, "
            f"{v.patch_size} x {v.shuffle}"
        )
    # Each is one number of the released format, so that other values could not be saved.
    if v.mlp_hidden != v.hidden_size * v.shuffle**2:
        yield (
            f"{where}{name('mlp_hidden')} is {v.mlp_hidden}; it must be {name('hidden_size')} x {shuffle}^2, "
            f"{v.hidden_size * v.shuffle**2}, since intermediate_size is both the feed-forward's width and what the "
            "adapter takes"
        )
    if v.adapter_out != v.adapter_hidden:
        yield (
            f"{where}{name('adapter_out')} is {v.adapter_out}; it must equal {name('adapter_hidden')}, "
            f"{v.adapter_hidden}"
        )
