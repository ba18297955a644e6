"""The casts of `distill.model.casts` in Triton: largest magnitude, scale, cast and transposition in one kernel.

Offsets are int64, so tensors may be of any size. Magnitudes are compared as integers, in which NaN is the largest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill.model.fp8_format import ALIGNED, BELOW, FLOOR

IN_INTERPRETER = bool(triton.knobs.runtime.interpret)
_FLOOR = tl.constexpr(FLOOR)
# Columns that a program casts, and rows of them that it reads at a time: the fastest of six cuts of each (LOG.md).
_OF_WEIGHTS, _OF_GROUPS, _OF_ONE = (64, 128), (32, 128), (32, 256)


@triton.jit
def _scale(largest, BELOW: tl.constexpr):
    """The bits of the fp32 scale for those of a largest magnitude, as `distill.model.casts.scale_of` has them."""
    field = tl.maximum((largest + 0x1FFFFF) >> 23, _FLOOR) - BELOW
    return tl.where(largest < 0x7F800000, field << 23, 0x7FC00000)


@triton.jit
def _inverse(scale):
    """1 / scale, fp32, of the bits of a power of two or NaN."""
    inverse = tl.where(scale < 0x7F800000, (254 << 23) - scale, 0x7FC00000)
    return inverse.to(tl.float32, bitcast=True)


@triton.jit
def _magnitude(x):
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _cast(x, BELOW: tl.constexpr, INTERPRETED: tl.constexpr):
    """fp32 within the range of the format to its codes, to the nearest, ties to even."""
    if INTERPRETED:  # Triton's interpreter rounds towards zero
        kept: tl.constexpr = 20 if BELOW == 8 else 21
        least: tl.constexpr = 121 if BELOW == 8 else 113  # exponent field of the least normal number
        step: tl.constexpr = 16384.0 if BELOW == 8 else 128.0  # to which subnormal numbers add without a fraction
        bits = x.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        normal = ((size + (1 << kept - 1) - 1 + ((size >> kept) & 1)) >> kept) - ((least - 1) << 23 - kept)
        added = (size.to(tl.float32, bitcast=True) + step).to(tl.int32, bitcast=True)
        base = tl.full(x.shape, step, tl.float32).to(tl.int32, bitcast=True)
        code = tl.where(size < (least << 23), added - base, normal)
        code = tl.where(size > 0x7F800000, 0x7F, code) | ((bits >> 24) & 0x80)
        result = code.to(tl.uint8)
    elif BELOW == 8:
        result = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        result = x.to(tl.float8e5).to(tl.uint8, bitcast=True)
    return result


@triton.jit
def _rows_kernel(
    x_ptr, codes_ptr, scale_ptr, rows, width,
    GIVEN: tl.constexpr, BELOW: tl.constexpr, INTERPRETED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    there = (row < rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    x = tl.load(x_ptr + place, mask=there, other=0.0)
    if GIVEN:
        scale = tl.load(scale_ptr) + tl.zeros([ROWS], tl.int32)
    else:
        scale = _scale(tl.max(_magnitude(x), axis=1), BELOW)
        tl.store(scale_ptr + row, scale, mask=row < rows)
    code = _cast(x.to(tl.float32) * _inverse(scale)[:, None], BELOW, INTERPRETED)
    tl.store(codes_ptr + place, code, mask=there)


@triton.jit
def _columns_kernel(
    x_ptr, codes_ptr, scale_ptr, ends_ptr, rows, padded, width, by_group, by_column,
    GROUPED: tl.constexpr, GIVEN: tl.constexpr, BELOW: tl.constexpr, INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Group e has `rows` rows, or with GROUPED those up to ends[e]; its column c is written from
    e * by_group + c * by_column + its first row on, `padded` long."""
    group = tl.program_id(0).to(tl.int64)
    if GROUPED:
        # Said, so that 16 codes are written at a time.
        start = tl.multiple_of(tl.load(ends_ptr + group - 1, mask=group > 0, other=0).to(tl.int64), 16)
        end = tl.multiple_of(tl.load(ends_ptr + group).to(tl.int64), 16)
        last = end
    else:
        start = group * rows
        end = start + rows
        last = start + padded
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    valid = column < width
    if GIVEN:
        scale = tl.load(scale_ptr) + tl.zeros([WIDTH], tl.int32)
    else:
        largest = tl.zeros([WIDTH], tl.int32)
        for first in range(start, end, ROWS):
            row = first + tl.arange(0, ROWS)
            there = (row < end)[:, None] & valid[None, :]
            x = tl.load(x_ptr + row[:, None] * width + column[None, :], mask=there, other=0.0)
            largest = tl.maximum(largest, tl.max(_magnitude(x), axis=0))
        scale = _scale(largest, BELOW)
        tl.store(scale_ptr + group * width + column, scale, mask=valid)
    inverse = _inverse(scale)
    for first in range(start, last, ROWS):
        row = first + tl.arange(0, ROWS)
        there = (row < end)[:, None] & valid[None, :]
        x = tl.load(x_ptr + row[:, None] * width + column[None, :], mask=there, other=0.0)
        code = _cast(x.to(tl.float32) * inverse[None, :], BELOW, INTERPRETED)
        place = group * by_group + column[None, :].to(tl.int64) * by_column + row[:, None]
        tl.store(codes_ptr + place, code, mask=(row < last)[:, None] & valid[None, :])


def launch_rows(x: Tensor, scale: Tensor | None, below: int) -> tuple[Tensor, Tensor]:
    """Codes as uint8 in the shape of contiguous bf16 x [..., K], and scales [...] or the given one."""
    width = x.shape[-1]
    rows = x.numel() // width
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    found = x.new_empty(x.shape[:-1], dtype=torch.float32) if scale is None else scale
    wide = triton.next_power_of_2(width)
    tall = max(1, 4096 // wide)
    _rows_kernel[(triton.cdiv(rows, tall),)](
        x, codes, found.view(torch.int32), rows, width,
        GIVEN=scale is not None, BELOW=below, INTERPRETED=IN_INTERPRETER, ROWS=tall, WIDTH=wide,
        num_warps=min(16, max(4, wide // 1024)),
    )  # fmt: skip
    return codes, found


def launch_columns(x: Tensor, ends_E: Tensor | None, scale: Tensor | None, below: int) -> tuple[Tensor, Tensor]:
    """Codes as uint8 of contiguous bf16 x [..., K, N], transposed and filled up with zeros, and scales [..., N], [E, N]
    or the given one."""
    *batch, rows, width = x.shape
    groups = x[..., 0, 0].numel() if ends_E is None else len(ends_E)
    padded = rows + -rows % ALIGNED
    codes = torch.empty((*batch, width, padded), dtype=torch.uint8, device=x.device)
    by_group = width * padded - rows if ends_E is None else 0
    heads = batch if ends_E is None else [groups]
    found = x.new_empty((*heads, width), dtype=torch.float32) if scale is None else scale
    wide, tall = _OF_GROUPS if ends_E is not None else _OF_WEIGHTS if batch else _OF_ONE
    _columns_kernel[(groups, triton.cdiv(width, wide))](
        x, codes, found.view(torch.int32), ends_E, rows, padded, width, by_group, padded,
        GROUPED=ends_E is not None, GIVEN=scale is not None, BELOW=below, INTERPRETED=IN_INTERPRETER,
        ROWS=tall, WIDTH=wide, num_warps=8,
    )  # fmt: skip
    return codes, found


# Operators, so that fake tensors and the compiler know the shapes without launching anything.


@torch.library.custom_op("codistill::cast_rows", mutates_args=())
def _rows(x: Tensor, scale: Tensor | None, below: int) -> tuple[Tensor, Tensor]:
    codes, found = launch_rows(x, scale, below)
    return codes, found if scale is None else found.clone()


@_rows.register_fake
def _(x: Tensor, scale: Tensor | None, below: int) -> tuple[Tensor, Tensor]:
    found = x.new_empty(x.shape[:-1] if scale is None else (), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.uint8), found


@torch.library.custom_op("codistill::cast_columns", mutates_args=())
def _columns(x: Tensor, ends_E: Tensor | None, scale: Tensor | None, below: int) -> tuple[Tensor, Tensor]:
    codes, found = launch_columns(x, ends_E, scale, below)
    return codes, found if scale is None else found.clone()


@_columns.register_fake
def _(x: Tensor, ends_E: Tensor | None, scale: Tensor | None, below: int) -> tuple[Tensor, Tensor]:
    *batch, rows, width = x.shape
    heads = batch if ends_E is None else [len(ends_E)]
    codes = x.new_empty((*batch, width, rows + -rows % ALIGNED), dtype=torch.uint8)
    return codes, x.new_empty((*heads, width) if scale is None else (), dtype=torch.float32)


def rows(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `distill.model.casts.rows`."""
    codes, found = _rows(x, scale, BELOW[dtype])
    return codes.view(dtype), found


def columns(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `distill.model.casts.columns`."""
    codes, found = _columns(x, None, scale, BELOW[dtype])
    return codes.view(dtype), found


def columns_of_groups(x: Tensor, ends_E: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `distill.model.casts.columns_of_groups`."""
    codes, found = _columns(x, ends_E, None, BELOW[dtype])
    return codes.view(dtype), found
