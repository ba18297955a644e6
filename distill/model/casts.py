"""Casts to FP8 with power-of-two scales, on every device with the same bits; on CUDA in Triton where it is installed.

The largest magnitude of a row becomes the largest that its scale can hold, so nothing saturates. What is cast is bf16
(fp32 is rounded to it first): values times a power of two are exact, so there is one rounding, and casting what a cast
stands for changes nothing. A row that holds NaN or an infinity gets a scale of NaN and is NaN as a whole.
"""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.model.fp8_format import ALIGNED, BELOW, E4M3, FLOOR


class Cast(NamedTuple):
    """A matrix or a batch of them in FP8, `codes` times `scale`, contiguous along the dimension it is contracted over.

    The scale is fp32: one for each row, a scalar for all, or [E, rows] where `ends_E` splits the columns.
    """

    codes: Tensor
    scale: Tensor
    ends_E: Tensor | None = None


def scale_of(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The least power of two, fp32, by which magnitudes must be divided to fit; NaN of what is not finite."""
    bits = largest.float().view(torch.int32)
    # Carries into the exponent where the mantissa exceeds 1.75.
    field = ((bits + 0x1FFFFF) >> 23).clamp(min=FLOOR) - BELOW[dtype]
    return torch.where(largest.isfinite(), (field << 23).view(torch.float32), torch.nan)


def scale_of_all(x: Tensor, dtype: torch.dtype) -> Tensor:
    """One scale for a whole tensor, scalar."""
    least, most = torch.aminmax(x.bfloat16())
    return scale_of(torch.maximum(-least, most), dtype)


def rows(x: Tensor, dtype: torch.dtype = E4M3, scale: Tensor | None = None) -> Cast:
    """x [..., K] cast along its last dimension; scale: one for all, or None for one a row."""
    x = x.bfloat16().contiguous()
    if (kernels := _kernels(x)) is not None:
        return Cast(*kernels.rows(x, scale, dtype))
    if scale is not None:
        return Cast((x.float() / scale).to(dtype), scale)
    scale = scale_of(x.abs().amax(-1), dtype)
    return Cast((x.float() / scale.unsqueeze(-1)).to(dtype), scale)


def columns(x: Tensor, dtype: torch.dtype = E4M3, scale: Tensor | None = None) -> Cast:
    """x [..., K, N] cast along K and transposed, [..., N, K']; zeros follow up to K', the next multiple of 16."""
    x = x.bfloat16()
    if (kernels := _kernels(x)) is not None:
        return Cast(*kernels.columns(x.contiguous(), scale, dtype))
    return rows(F.pad(x.mT, (0, -x.shape[-2] % ALIGNED)), dtype, scale)


def columns_of_groups(x: Tensor, ends_E: Tensor, dtype: torch.dtype = E4M3) -> Cast:
    """x [R, N] cast along R and transposed, [N, R], with a scale for each column of each group of rows, [E, N].

    Groups end at `ends_E`, multiples of 16, the last at R.
    """
    x = x.bfloat16()
    if (kernels := _kernels(x)) is not None:
        codes, scale_EN = kernels.columns_of_groups(x.contiguous(), ends_E, dtype)
        return Cast(codes, scale_EN, ends_E)
    largest_BN = x.unflatten(0, (-1, ALIGNED)).abs().amax(1)
    group_B = torch.searchsorted(ends_E, ends_E.new_ones(len(largest_BN)).cumsum(0) * ALIGNED)
    place_BN = group_B.unsqueeze(1).expand_as(largest_BN)
    largest_EN = largest_BN.new_zeros(len(ends_E), x.shape[1]).scatter_reduce_(0, place_BN, largest_BN, "amax")
    scale_EN = scale_of(largest_EN, dtype)
    codes = (x.float() / _by_row(scale_EN, ends_E, len(x))).to(dtype)
    return Cast(codes.mT.contiguous(), scale_EN, ends_E)


def value(cast: Cast) -> Tensor:
    """What a cast stands for, in fp32; exact in bf16 too."""
    codes = cast.codes.float()
    if cast.ends_E is not None:
        return codes * _by_row(cast.scale, cast.ends_E, codes.shape[1]).mT
    return codes * (cast.scale.unsqueeze(-1) if cast.scale.ndim else cast.scale)


def _by_row(scale_EN: Tensor, ends_E: Tensor, rows: int) -> Tensor:
    """The scales of each of R rows' group, [R, N]."""
    every_R = torch.arange(rows, dtype=ends_E.dtype, device=ends_E.device)
    return scale_EN.index_select(0, torch.searchsorted(ends_E, every_R, right=True))


def _kernels(x: Tensor) -> ModuleType | None:
    """The kernels for a tensor of its device; None: plain torch casts it."""
    return _triton() if x.is_cuda else None


@functools.cache
def _triton() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from distill.model import cast_kernels

    return cast_kernels
