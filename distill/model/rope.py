"""Rotary positions: adjacent channel pairs, real arithmetic, fp32, with llama3 frequency scaling."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from distill.config.schema import ModelConfig, RopeScaling
from distill.model.transfer import sent


class Rotation(NamedTuple):
    """Input of `rotate`, fp32 [T, 1, C] each."""

    cos_T1C: Tensor
    sin_T1C: Tensor
    """Negative in the first channel of each pair."""


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Angle per position of each channel pair, fp32 [C / 2].

    With scaling, wavelengths above original / low are stretched by `factor`, those below original / high stay,
    and those between are interpolated (the llama3 rule).
    """
    exponent_P = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    plain_P = 1.0 / theta**exponent_P
    if scaling is None:
        return plain_P
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns_P = scaling.original_positions / (2 * math.pi / plain_P)  # full turns within the original context
    # On a hard step (low == high, as in the released models) the quotient is infinite, or 0 / 0 just on the step.
    keep_P = ((turns_P - low) / (high - low)).nan_to_num(nan=1.0).clamp(0, 1)
    return (1 - keep_P) * (plain_P / scaling.factor) + keep_P * plain_P


class RopeTable:
    """Rotations by position, up to the longest segment so far."""

    def __init__(self, config: ModelConfig):
        self.frequencies = frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        self.cos_SC = self.sin_SC = torch.empty(0, config.head_dim, device="cpu")

    def lookup(self, position_T: Tensor, longest: int) -> Rotation:
        """The rotation of each token.

        Args:
            position_T: int64, each below `longest`, on the device of the result.
        """
        if len(self.cos_SC) < longest or self.cos_SC.device != position_T.device:
            self._grow(1 << (longest - 1).bit_length(), position_T.device)
        return Rotation(self.cos_SC[position_T].unsqueeze(1), self.sin_SC[position_T].unsqueeze(1))

    def _grow(self, positions: int, device: torch.device) -> None:
        angle_SP = torch.arange(positions, dtype=torch.float32, device="cpu")[:, None] * self.frequencies
        cos_SC, sin_SC = cos_sin(angle_SP)
        self.cos_SC, self.sin_SC = sent(cos_SC, device), sent(sin_SC, device)


def cos_sin(angle_SP: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines [S, C = 2 P] of the angles of the channel pairs, for `rotate`."""
    sin_SP = angle_SP.sin()
    return angle_SP.cos().repeat_interleave(2, 1), torch.stack((-sin_SP, sin_SP), -1).flatten(1)


def rotate(x_TNC: Tensor, cos_T1C: Tensor, sin_T1C: Tensor) -> Tensor:
    """Turns each pair (2i, 2i + 1) of the channels by its angle; fp32 inside, x's dtype outside."""
    x = x_TNC.float()
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos_T1C, swapped, sin_T1C).type_as(x_TNC)
