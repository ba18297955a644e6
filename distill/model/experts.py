"""The mixture of experts: dispatch, grouped products, combine, and the shared expert beside it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.config.schema import ModelConfig
from distill.model.linear import GroupedFn, SwiGLU
from distill.model.parts import Parts
from distill.model.router import Router


class Experts(nn.Module):
    """Routed experts of a layer as two 3-D parameters, so that each gets a gradient even where it gets no token."""

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
    """The selection of one MoE layer's router for T tokens."""

    logits_TE: Tensor
    """Attached to the graph."""
    experts_TA: Tensor
    """int64, the selected experts."""
    counts_E: Tensor
    """int64, tokens given to each expert; they sum to T * A."""


class MoE(nn.Module):
    """shared(h) + sum over the selected experts of expert(weight * h): the weight scales the expert's *input*.

    The layer holds the experts that its dispatcher holds.
    """

    def __init__(self, config: ModelConfig, parts: Parts):
        super().__init__()
        size, hidden = config.hidden_size, config.expert_hidden
        self.dispatcher = parts.dispatcher
        self.router = Router(size, config.experts, config.active_experts)
        self.experts = Experts(len(self.dispatcher.held(config.experts)), size, hidden, parts.grouped_fn)
        self.shared_expert = SwiGLU(size, hidden, parts.linear_fn)

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Routed]:
        """Output [T, D], and the router's selection."""
        logits_TE, experts_TA, weight_TA = self.router(hidden_TD)
        sent = self.dispatcher.dispatch(hidden_TD, experts_TA, weight_TA, logits_TE.shape[1])
        routed_TD = self.dispatcher.combine(self.experts(sent.x_RD, sent.ends_E), sent.state)
        return self.shared_expert(hidden_TD) + routed_TD, Routed(logits_TE, experts_TA, sent.counts_E)
