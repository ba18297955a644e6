"""The one Transformer of the project: teacher and student are two configurations of it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distill.config.errors import DataError
from distill.config.model import moe_layers, rope_layers
from distill.config.schema import ModelConfig
from distill.model.attention import Attention, AttentionPlan, Plans, temperature
from distill.model.experts import MoE, Routed
from distill.model.images import Images
from distill.model.kv import KV
from distill.model.linear import SwiGLU
from distill.model.norm import RMSNorm
from distill.model.parametrization import scales
from distill.model.parts import PLAIN, Parts
from distill.model.rope import RopeTable
from distill.model.router import Router
from distill.model.segments import Segments
from distill.model.vision import VisionModel, ZeroGradients, check_images, place, projector

HeadFn = Callable[[Tensor, Tensor], Any]
"""(normed hidden [T, D], unembedding weight [V, D]) -> anything."""


class Routing(NamedTuple):
    """The selections of all routers in one forward pass; L counts MoE layers only."""

    counts_LE: Tensor
    """int64, tokens given to each expert; a row sums to T * A."""
    logits_LTE: tuple[Tensor, ...]
    """Router logits [T, E] of each MoE layer, attached to the graph."""
    experts_LTA: tuple[Tensor, ...]
    """int64, the selected experts [T, A] of each MoE layer."""


class Layer(nn.Module):
    """Pre-norm attention, then a pre-norm feed-forward that is dense or MoE."""

    def __init__(self, config: ModelConfig, moe: bool, rope: bool, parts: Parts):
        super().__init__()
        self.rope = rope
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, rope, parts)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.feed_forward: MoE | SwiGLU = (
            MoE(config, parts) if moe else SwiGLU(config.hidden_size, config.dense_hidden, parts.linear_fn)
        )

    def forward(self, hidden_TD: Tensor, plan: AttentionPlan, kv: KV | None = None) -> tuple[Tensor, Routed | None]:
        """New hidden states, and the router's selection where the layer is MoE."""
        hidden_TD = hidden_TD + self.self_attn(self.input_layernorm(hidden_TD), plan, kv)
        normed_TD = self.post_attention_layernorm(hidden_TD)
        if isinstance(self.feed_forward, MoE):
            out_TD, routed = self.feed_forward(normed_TD)
            return hidden_TD + out_TD, routed
        return hidden_TD + self.feed_forward(normed_TD), None


class Embedding(nn.Module):
    """Rows of a weight [V, D]."""

    def __init__(self, vocab_size: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, size))

    def forward(self, ids_T: Tensor) -> Tensor:
        return F.embedding(ids_T, self.weight)


class Head(nn.Module):
    """Owns the unembedding weight [V, D] and applies functions that need it inside its own forward.

    ZeRO-3 gathers a weight for the forward of the module that owns it, so a fused head-and-loss must run here.
    """

    def __init__(self, vocab_size: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, size))

    def forward(self, hidden_TD: Tensor, head_fn: HeadFn) -> Any:
        return head_fn(hidden_TD, self.weight)


class Transformer(nn.Module):
    """Decoder of the Llama 4 family: MoE, layers with and without positions, chunked attention; vision if configured.

    Weights are drawn from torch's global generator (matrices normal with `init_std` times their factor in
    `parametrization`, norms 1), the text model's first, so that vision does not change them; under a meta device
    nothing is drawn. Names are those of the released checkpoints but for embed, layers, norm and head (see `hf`).

    Args:
        config: a configuration that passed `distill.config`'s checks.
        parts: products and dispatcher; a run's are `Parts.of(numerics, dispatcher)`.

    Attributes:
        activation_checkpointing: keep only each layer's input (the vision tower's too) for the backward pass and
            compute the rest again.
    """

    def __init__(self, config: ModelConfig, parts: Parts = PLAIN):
        super().__init__()
        self.config = config
        self.linear = parts.plain.linear
        self.activation_checkpointing = False
        moe, rope = set(moe_layers(config)), rope_layers(config)
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i in moe, rope[i], parts) for i in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = Head(config.vocab_size, config.hidden_size)
        self._table = RopeTable(config)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=config.init_std * scales(config, name).init)
        self.vision_model: VisionModel | None = None
        if config.vision is not None:
            self.vision_model = VisionModel(config.vision, config.init_std, parts.plain)
            self.multi_modal_projector = projector(config.vision, config.hidden_size, config.init_std, parts.plain)

    @property
    def routers(self) -> list[Router]:
        """The router of each MoE layer, in layer order."""
        return [layer.feed_forward.router for layer in self.layers if isinstance(layer.feed_forward, MoE)]

    def forward(
        self,
        ids_BS: Tensor,
        documents_BS: Tensor | Segments | None = None,
        head_fn: HeadFn | None = None,
        images: Images | None = None,
    ) -> tuple[Any, Routing]:
        """Hidden states of every token, through `head_fn` if there is one.

        Args:
            ids_BS: token ids.
            documents_BS: ordinal of each token's document within its row (int, on the CPU, non-decreasing), or
                `Segments` built from it; None: each row is one document. Positions, chunks and attention are the
                document's own: packed documents do not attend to each other.
            head_fn: called with the normed hidden states [T, D] and the unembedding weight [V, D].
            images: their features take the place of embeddings where `patch_BS` has them.

        Returns:
            The result of head_fn, or without it the normed hidden states [T, D] with T = B * S; and the routing.

        Raises:
            DataError: a document is longer than the configuration's `max_positions`, or images do not fit the model or
                the batch.
        """
        plans = self.plans(self._segments(ids_BS, documents_BS))
        return self.through_layers(self.embedded(ids_BS, images), plans, head_fn)

    def embedded(self, ids_BS: Tensor, images: Images | None = None) -> Tensor:
        """Input of the first layer, [B * S, D]; arguments as in `forward`."""
        if images is not None:
            check_images(images, self.config.vision, ids_BS)
        hidden_TD = self.embed(ids_BS.flatten())
        if self.vision_model is None:
            return hidden_TD
        if images is None or not len(images.tiles_NCHW):  # every parameter of vision gets a gradient nevertheless
            parameters = *self.vision_model.parameters(), *self.multi_modal_projector.parameters()
            return ZeroGradients.apply(hidden_TD, *parameters)
        features_NPO = self.vision_model(images.tiles_NCHW, self.activation_checkpointing)
        return place(hidden_TD, self.multi_modal_projector(features_NPO), images.patch_BS)

    def through_layers(
        self,
        hidden_TD: Tensor,
        plans: Plans,
        head_fn: HeadFn | None,
        caches: Sequence[KV | None] | None = None,
    ) -> tuple[Any, Routing]:
        """`forward` from what `embedded` and `plans` return; with caches of the layers to fill and to read."""
        routed: list[Routed] = []
        for layer, kv in zip(self.layers, caches or [None] * len(self.layers)):
            plan = plans.rope if layer.rope else plans.nope
            if self.activation_checkpointing and torch.is_grad_enabled():
                hidden_TD, done = checkpoint(layer, hidden_TD, plan, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden_TD, done = layer(hidden_TD, plan, kv)
            if done is not None:
                routed.append(done)
        hidden_TD = self.norm(hidden_TD)
        out = hidden_TD if head_fn is None else self.head(hidden_TD, head_fn)
        counts_LE = torch.zeros(0, self.config.experts, dtype=torch.int64, device=hidden_TD.device)
        if routed:
            counts_LE = torch.stack([layer.counts_E for layer in routed])
        return out, Routing(counts_LE, tuple(r.logits_TE for r in routed), tuple(r.experts_TA for r in routed))

    def logits(
        self, ids_BS: Tensor, documents_BS: Tensor | Segments | None = None, images: Images | None = None
    ) -> Tensor:
        """Next-token logits [B, S, V] in the model's dtype; arguments as in `forward`."""
        logits_TV, _ = self(ids_BS, documents_BS, self.linear, images)
        return logits_TV.unflatten(0, ids_BS.shape)

    def plans(self, segments: Segments) -> Plans:
        """What attention needs of a batch, whose segments are on the model's device."""
        config, (full, chunked) = self.config, segments
        if full.longest > config.max_positions:
            raise DataError(
                f"a document has {full.longest} tokens; the model's max_positions is {config.max_positions}"
            )
        rotation = self._table.lookup(chunked.position_P, chunked.longest)
        factor = temperature(full, config.floor_scale, config.attn_scale) if config.temperature_tuning else None
        return Plans(AttentionPlan(chunked, rotation, None), AttentionPlan(full, None, factor))

    def _segments(self, ids_BS: Tensor, documents_BS: Tensor | Segments | None) -> Segments:
        """The plans of a batch, on its device."""
        if documents_BS is None:
            documents_BS = Segments.whole_rows(*ids_BS.shape, self.config.chunk_size)
        elif isinstance(documents_BS, Tensor):
            assert documents_BS.shape == ids_BS.shape, "one document ordinal per token"
            documents_BS = Segments.build(documents_BS, self.config.chunk_size)
        return documents_BS.to(ids_BS.device)
