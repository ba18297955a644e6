"""Products of FP8 operands: torch's scaled products on CUDA, and on a CPU the same operands multiplied in fp32.

CUDA demands more than a CPU would notice, so what it demands is asserted on every device.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from distill.model.casts import Cast, value
from distill.model.fp8_format import ALIGNED

Operand = Cast | Tensor
"""What a product takes; on a CPU the value of the cast, which a weight then need not make for every product."""
PUBLIC = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
"""torch's public names are used from that version on, before it the private ones."""


def operand(cast: Cast) -> Operand:
    return cast if cast.codes.is_cuda else value(cast)


def product(a: Operand, b: Operand, ends_E: Tensor | None = None, *, fast: bool = True) -> Tensor:
    """a b^T for a [M, K] and b [N, K], bf16 on CUDA, fp32 on a CPU.

    Args:
        b: with ends_E [E, N, K], each for the rows of a that end there; or [N, K] cut along K as a is, which gives
            [E, M, N].
        fast: on CUDA a sum of many terms is kept in fewer bits.
    """
    if isinstance(a, Cast) and isinstance(b, Cast):
        _check(a.codes, b.codes, ends_E)
        if ends_E is None:
            return scaled_mm(a, b, fast)
        return scaled_grouped_mm(a, b, ends_E)
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    _check(a, b, ends_E)
    return a @ b.mT if ends_E is None else F.grouped_mm(a, b.mT, offs=ends_E)


def _check(a: Tensor, b: Tensor, ends_E: Tensor | None) -> None:
    """What the hardware demands; the number of rows of a is free, as far as groups of them are multiples of 16."""
    assert a.is_contiguous() and b.is_contiguous(), (a.stride(), b.stride())
    assert a.shape[-1] == b.shape[-1] and not a.shape[-1] % ALIGNED and not b.shape[-2] % ALIGNED, (a.shape, b.shape)
    assert ends_E is None or (ends_E.dtype == torch.int32 and not a.shape[-2] % ALIGNED), a.shape


def scaled_mm(a: Cast, b: Cast, fast: bool) -> Tensor:
    """The product of casts with a scale for each row of both, or for the whole of both."""
    whole = a.scale.ndim == 0
    scale_a, scale_b = (a.scale, b.scale) if whole else (a.scale.unsqueeze(1), b.scale.unsqueeze(0))
    # By row the kernel without fast sums is several times slower.
    fast = fast or not whole
    if not PUBLIC:
        return torch._scaled_mm(
            a.codes, b.codes.mT, scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=fast
        )  # fmt: skip
    recipe = F.ScalingType.TensorWise if whole else F.ScalingType.RowWise
    return F.scaled_mm(
        a.codes, b.codes.mT, scale_a, recipe, scale_b, recipe, output_dtype=torch.bfloat16, use_fast_accum=fast
    )


def scaled_grouped_mm(a: Cast, b: Cast, ends_E: Tensor) -> Tensor:
    """The product of casts with a scale for each row; the kernel has no other."""
    scale_a, scale_b = a.scale, b.scale
    if b.codes.ndim == 2:
        scale_a, scale_b = scale_a.flatten(), scale_b.flatten()
    if not PUBLIC or isinstance(a.codes, FakeTensor):  # the public one has no form for fake tensors
        return torch._scaled_grouped_mm(
            a.codes, b.codes.mT, scale_a, scale_b, ends_E, out_dtype=torch.bfloat16, use_fast_accum=True
        )  # fmt: skip
    recipe, functional = F.ScalingType.RowWise, cast(Any, F)
    return functional.scaled_grouped_mm(
        a.codes, b.codes.mT, scale_a, recipe, scale_b, recipe,
        offs=ends_E, output_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip
