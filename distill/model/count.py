"""Sizes and costs of a configuration by formula; no model is built."""

from dataclasses import dataclass

from distill.config.model import moe_layers, rope_layers
from distill.config.schema import ModelConfig, VisionConfig


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters; the router bias is a buffer and not among them."""

    total: int
    """Vision included."""
    active: int
    """Used by one token of text, the whole embedding table counted."""
    active_without_embedding: int
    embedding: int
    """The input embedding alone; the head is as large again."""
    vision: int = 0
    """The tower and its adapter."""
    projector: int = 0


def count_parameters(config: ModelConfig) -> Counts:
    """Parameters in all and per token."""
    size, moe = config.hidden_size, len(moe_layers(config))
    attention = 2 * size * (config.heads + config.kv_heads) * config.head_dim
    embedding = config.vocab_size * size
    always = 2 * embedding + config.layers * (attention + 2 * size) + size
    always += (config.layers - moe) * 3 * size * config.dense_hidden
    expert = 3 * size * config.expert_hidden
    always += moe * (config.experts * size + expert)  # router and shared expert
    active = always + moe * config.active_experts * expert
    text = always + moe * config.experts * expert
    if config.vision is None:
        return Counts(text, active, active - embedding, embedding)
    vision, projector = _vision_parameters(config.vision), config.vision.adapter_out * size
    return Counts(text + vision + projector, active, active - embedding, embedding, vision, projector)


def _vision_parameters(v: VisionConfig) -> int:
    size, patches = v.hidden_size, (v.tile_size // v.patch_size) ** 2
    embeddings = 3 * v.patch_size**2 * size + size + (patches + 1) * size
    block = 4 * (size * size + size) + 2 * size * v.mlp_hidden + v.mlp_hidden + size + 2 * 2 * size
    adapter = size * v.shuffle**2 * v.adapter_hidden + v.adapter_hidden * v.adapter_out
    return embeddings + v.layers * block + 2 * 2 * size + adapter


def flops_per_token(config: ModelConfig, sample_tokens: int, tiles: float = 0.0) -> float:
    """Floating-point operations of a forward pass, mean per token of a one-document sample; training takes 3 times it.

    A multiply-add is 2. Matrix products and attention over the visible positions are counted; norms, softmax and
    activations are not. `tiles`: of images in a sample.
    """
    norms = (2 * config.layers + 1) * config.hidden_size
    products = count_parameters(config).active_without_embedding - norms
    chunk = min(config.chunk_size or sample_tokens, sample_tokens)
    chunks, rest = divmod(sample_tokens, chunk)
    full_pairs = sample_tokens * (sample_tokens + 1) / 2
    chunk_pairs = chunks * chunk * (chunk + 1) / 2 + rest * (rest + 1) / 2
    pairs = sum(chunk_pairs if rope else full_pairs for rope in rope_layers(config))
    # Scores and mixing: two multiply-adds per pair, head and channel.
    vision = tiles * vision_flops_per_tile(config) / sample_tokens
    return 2 * products + 4 * config.heads * config.head_dim * pairs / sample_tokens + vision


def vision_flops_per_tile(config: ModelConfig) -> float:
    """Floating-point operations of one tile's way to the text model, forward; counted as in `flops_per_token`.

    A frozen tower costs little more than this, a trained one 3 times it. A model without vision costs nothing.
    """
    v = config.vision
    if v is None:
        return 0.0
    size, patches = v.hidden_size, (v.tile_size // v.patch_size) ** 2
    rows = patches + 1  # the class token
    block = rows * (4 * size * size + 2 * size * v.mlp_hidden) + 2 * rows * rows * size
    adapter = size * v.shuffle**2 * v.adapter_hidden + v.adapter_hidden * v.adapter_out
    token = adapter + v.adapter_out * config.hidden_size
    return 2.0 * (patches * 3 * v.patch_size**2 * size + v.layers * block + v.tile_tokens * token)
