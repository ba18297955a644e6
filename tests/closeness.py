"""How far two tensors lie apart, on the scale of what is compared: a bound holds for whatever size the numbers have."""

from collections.abc import Iterable

import torch
from torch import Tensor


def worst(found: Tensor, expected: Tensor) -> float:
    """The greatest difference of two numbers, over the greatest magnitude expected."""
    assert found.shape == expected.shape, f"shapes are {tuple(found.shape)} and {tuple(expected.shape)}"
    return _ratio((found.detach().double() - expected.detach().double()).abs().max(), expected.detach().abs().max())


def apart(found: Tensor, expected: Tensor, whole: Iterable[Tensor] = ()) -> float:
    """The norm of the difference, over that of what is expected; whole: over the norm of all of these together, where
    the tensors are parts such as the gradients of single parameters."""
    assert found.shape == expected.shape, f"shapes are {tuple(found.shape)} and {tuple(expected.shape)}"
    scale = torch.stack([each.detach().double().norm() for each in (list(whole) or [expected])]).norm()
    return _ratio((found.detach().double() - expected.detach().double()).norm(), scale)


def _ratio(difference: Tensor, scale: Tensor) -> float:
    """difference / scale; infinite where the difference is not finite, or the scale alone is 0."""
    if not torch.isfinite(difference):
        return float("inf")
    return difference.item() / scale.item() if scale > 0 else float("inf") if difference > 0 else 0.0
