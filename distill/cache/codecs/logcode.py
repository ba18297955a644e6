"""Probabilities in one byte: 256 levels in geometric progression from `low` to 1."""

import math

import torch
from torch import Tensor


class LogCode:
    """level(c) = low ** (1 - c / 255); neighbors differ by the factor low ** (-1 / 255)."""

    def __init__(self, low: float):
        self.low = low
        self.levels = torch.logspace(math.log10(low), 0.0, 256, dtype=torch.float64).float()
        self.levels[0], self.levels[255] = low, 1.0

    def nearest(self, probs: Tensor) -> Tensor:
        """uint8 codes of the levels nearest in ratio; what is below `low` takes the lowest."""
        place = torch.log(probs.double().clamp(self.low, 1.0)) / -math.log(self.low) * 255 + 255
        return place.round().to(torch.uint8)

    def unbiased(self, probs: Tensor, uniforms: Tensor) -> Tensor:
        """uint8 codes whose level is `probs` in expectation over `uniforms`, for probs in [low, 1].

        Of the two neighboring levels the upper is taken with probability (p - lower) / (upper - lower).
        """
        levels = self.levels.to(probs.device)
        lower = (torch.bucketize(probs, levels, right=True) - 1).clamp(0, 254)
        share = (probs - levels[lower]) / (levels[lower + 1] - levels[lower])
        return (lower + (uniforms < share)).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """float32 probabilities."""
        return self.levels.to(codes.device)[codes.long()]
