"""Grouped-query attention over segments of tokens, with or without rotary positions."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from distill.config.schema import ModelConfig
from distill.model.kv import KV, Slots
from distill.model.linear import Linear
from distill.model.norm import rms_norm
from distill.model.parts import Parts
from distill.model.rope import Rotation, rotate
from distill.model.segments import Block, SegmentPlan


class AttentionPlan(NamedTuple):
    """What all attention layers of one kind share in a forward pass."""

    segments: SegmentPlan
    rotation: Rotation | None
    """[P, 1, C]; None: layers of this kind have no rotary positions."""
    temperature_P11: Tensor | None
    """fp32 factor of the queries; None where it is 1 everywhere."""
    slots: Slots | None = None
    """Cached decoding: where keys and values go in each layer's cache."""


class Plans(NamedTuple):
    """The two kinds of layers in one forward pass."""

    rope: AttentionPlan
    """Rotary positions, attention within chunks."""
    nope: AttentionPlan
    """No positions, attention within documents."""


def temperature(plan: SegmentPlan, floor_scale: float, attn_scale: float) -> Tensor | None:
    """Query factor of layers without positions, 1 + attn_scale * ln(1 + floor((p + 1) / floor_scale)), [P, 1, 1]."""
    if plan.longest < floor_scale:
        return None
    level_P = torch.floor((plan.position_P.float() + 1.0) / floor_scale)
    return (torch.log1p(level_P) * attn_scale + 1.0)[:, None, None]


class Attention(nn.Module):
    """Causal within each segment; keys and values have fewer heads than queries, each shared by H / G of them."""

    def __init__(self, config: ModelConfig, rope: bool, parts: Parts):
        super().__init__()
        linear_fn, self.attend = parts.linear_fn, parts.plain.attend
        self.head_dim = config.head_dim
        self.qk_norm_eps = config.norm_eps if rope and config.qk_norm else None
        width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, width, linear_fn)
        self.k_proj = Linear(config.hidden_size, kv_width, linear_fn)
        self.v_proj = Linear(config.hidden_size, kv_width, linear_fn)
        self.o_proj = Linear(width, config.hidden_size, linear_fn)

    def forward(self, hidden_TD: Tensor, plan: AttentionPlan, kv: KV | None = None) -> Tensor:
        segments, rotation, temperature_P11, slots = plan
        hidden_PD = hidden_TD if segments.gather_P is None else hidden_TD.index_select(0, segments.gather_P)
        q_PHC = self.q_proj(hidden_PD).unflatten(-1, (-1, self.head_dim))
        k_PGC = self.k_proj(hidden_PD).unflatten(-1, (-1, self.head_dim))
        v_PGC = self.v_proj(hidden_PD).unflatten(-1, (-1, self.head_dim))
        if rotation is not None:
            q_PHC, k_PGC = rotate(q_PHC, *rotation), rotate(k_PGC, *rotation)
        if self.qk_norm_eps is not None:
            q_PHC, k_PGC = rms_norm(q_PHC, self.qk_norm_eps), rms_norm(k_PGC, self.qk_norm_eps)
        if temperature_P11 is not None:
            q_PHC = (q_PHC * temperature_P11).type_as(q_PHC)
        if kv is not None and slots is not None:
            kv.write(k_PGC, v_PGC, slots)
        if kv is not None and slots is not None and slots.visible_BnS is not None:
            mixed_PD = kv.attend(q_PHC, slots.visible_BnS, self.attend)
        else:
            mixed_PD = self._attend(q_PHC, k_PGC, v_PGC, segments.blocks)
        if segments.scatter_T is not None:
            mixed_PD = mixed_PD.index_select(0, segments.scatter_T)
        return self.o_proj(mixed_PD)

    def _attend(self, q_PHC: Tensor, k_PGC: Tensor, v_PGC: Tensor, blocks: tuple[Block, ...]) -> Tensor:
        """One attention call per block; [P, H * C]."""
        sizes = [block.segments * block.length for block in blocks]
        mixed = []
        for block, *qkv in zip(blocks, q_PHC.split(sizes), k_PGC.split(sizes), v_PGC.split(sizes)):
            q, k, v = (x.unflatten(0, block).transpose(1, 2) for x in qkv)  # [segments, heads, length, C]
            y = self.attend(q, k, v, is_causal=True, enable_gqa=True)
            mixed.append(y.transpose(1, 2).flatten(2).flatten(0, 1))
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)
