"""Root-mean-square normalization with the cast order of the released models."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, in fp32, cast back to x's dtype."""
    return F.rms_norm(x.float(), x.shape[-1:], None, eps).type_as(x)


class RMSNorm(nn.Module):
    """`rms_norm` times a weight [D]."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # The product is taken in x's dtype, after the cast: a fused kernel that stays in fp32 differs in bf16.
        return rms_norm(x, self.eps) * self.weight
