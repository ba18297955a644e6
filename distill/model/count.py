"""Costs of a configuration by formula; no model is built."""

from distill.config.model import moe_layers, rope_layers
from distill.config.schema import ModelConfig


def multiplied_parameters(config: ModelConfig) -> int:
    """Parameters of the text model that one token is multiplied with: those of its experts and all other matrices."""
    size, moe = config.hidden_size, len(moe_layers(config))
    attention = 2 * size * (config.heads + config.kv_heads) * config.head_dim
    dense = (config.layers - moe) * 3 * size * config.dense_hidden
    experts = (1 + config.active_experts) * 3 * size * config.expert_hidden  # the shared one among them
    return config.vocab_size * size + config.layers * attention + dense + moe * (config.experts * size + experts)


def flops_per_token(config: ModelConfig, sample_tokens: int, tiles: float = 0.0) -> float:
    """Floating-point operations of a forward pass, mean per token of a one-document sample; training takes 3 times it.

    A multiply-add is 2. Matrix products and attention over the visible positions are counted; norms, softmax and
    activations are not. `tiles`: of images in a sample.
    """
    chunk = min(config.chunk_size or sample_tokens, sample_tokens)
    chunks, rest = divmod(sample_tokens, chunk)
    full_pairs = sample_tokens * (sample_tokens + 1) / 2
    chunk_pairs = chunks * chunk * (chunk + 1) / 2 + rest * (rest + 1) / 2
    pairs = sum(chunk_pairs if rope else full_pairs for rope in rope_layers(config))
    # Scores and mixing: two multiply-adds per pair, head and channel.
    attention = 4 * config.heads * config.head_dim * pairs / sample_tokens
    return 2 * multiplied_parameters(config) + attention + tiles * vision_flops_per_tile(config) / sample_tokens


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
