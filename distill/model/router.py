"""Which experts a token goes to, and how strongly."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Router(nn.Module):
    """Top-A experts by logit; each is weighted by the sigmoid of its logit, without renormalization.

    The bias [E] is state of load balancing, not a parameter: it moves the selection, never the weights. Where it is all
    zero, as in released checkpoints, experts are selected by logit; otherwise by sigmoid(logit) + bias.
    """

    bias: Tensor

    def __init__(self, size: int, experts: int, active: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, size))
        self.register_buffer("bias", torch.zeros(experts, dtype=torch.float32))
        self.active = active

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Router logits [T, E] in fp32, selected experts int64 [T, A] and their weights [T, A]."""
        logits_TE = F.linear(hidden_TD.float(), self.weight.float())
        with torch.no_grad():
            # Not sigmoid alone: it saturates, and ties would change the released routing. A tensor condition, so that
            # the host need not wait for the device to read whether the bias is zero.
            key_TE = torch.where(self.bias.any(), logits_TE.sigmoid() + self.bias, logits_TE)
            experts_TA = key_TE.topk(self.active, dim=-1).indices
        weight_TA = logits_TE.gather(-1, experts_TA).sigmoid().type_as(hidden_TD)
        return logits_TE, experts_TA, weight_TA

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # A model cast to bf16 keeps its bias in fp32: steps of 1e-3 would be lost in it.
        bias = self.bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.bias.dtype != torch.float32:
            self.bias = bias.to(self.bias.device)
        return self
