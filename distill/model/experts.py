"""The mixture of experts: dispatch, grouped products, combine, and the shared expert beside it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.config.schema import ModelConfig
from distill.model.linear import GroupedFn, LinearFn, SwiGLU
from distill.model.router import Router


class Experts(nn.Module):
    """All routed experts of a layer as two 3-D parameters, so that each gets a gradient even where it gets no token."""

    def __init__(self, experts: int, size: int, hidden: int, grouped_fn: GroupedFn):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, size, 2 * hidden))
        """[E, D, 2F]: gate, then up."""
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, size))
        self.grouped_fn = grouped_fn

    def forward(self, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        """Each row through its expert; rows are sorted by expert, `ends_E` (int32) closes each expert's rows."""
        gate_RF, up_RF = self.grouped_fn(x_RD, self.gate_up_proj, ends_E).chunk(2, dim=-1)
        return self.grouped_fn(F.silu(gate_RF) * up_RF, self.down_proj, ends_E)


class Routed(NamedTuple):
    """What one MoE layer's router did with T tokens."""

    logits_TE: Tensor
    """Attached to the graph."""
    experts_TA: Tensor
    """int64, the selected experts."""
    ends_E: Tensor
    """int32, where each expert's rows end among all T * A."""


class MoE(nn.Module):
    """shared(h) + sum over the selected experts of expert(weight * h): the weight scales the expert's *input*."""

    def __init__(self, config: ModelConfig, linear_fn: LinearFn, grouped_fn: GroupedFn):
        super().__init__()
        size, hidden = config.hidden_size, config.expert_hidden
        self.router = Router(size, config.experts, config.active_experts)
        self.experts = Experts(config.experts, size, hidden, grouped_fn)
        self.shared_expert = SwiGLU(size, hidden, linear_fn)

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Routed]:
        """Output [T, D], and what the router did."""
        logits_TE, experts_TA, weight_TA = self.router(hidden_TD)
        # Stable: tokens of an expert keep their order, so the bits depend on nothing but the input.
        expert_R, source_R = experts_TA.flatten().sort(stable=True)
        row_R = source_R.argsort()
        every_E = torch.arange(logits_TE.shape[1], device=hidden_TD.device)
        ends_E = torch.searchsorted(expert_R, every_E, right=True, out_int32=True)
        scaled_RD = (hidden_TD.unsqueeze(1) * weight_TA.unsqueeze(-1)).flatten(0, 1)
        y_RD = self.experts(scaled_RD.index_select(0, source_R), ends_E)
        y_TAD = y_RD.index_select(0, row_R).unflatten(0, experts_TA.shape)
        routed_TD = y_TAD.squeeze(1) if y_TAD.shape[1] == 1 else y_TAD.sum(1)
        return self.shared_expert(hidden_TD) + routed_TD, Routed(logits_TE, experts_TA, ends_E)
