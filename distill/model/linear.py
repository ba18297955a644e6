"""The kinds of products that a precision may replace, and the modules that own 2-D weights."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LinearFn = Callable[[Tensor, Tensor], Tensor]
"""(x [..., in], weight [out, in]) -> [..., out]."""
GroupedFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x [R, in], weight [E, in, out], ends [E] int32, last = R) -> [R, out]; rows ends[e-1]:ends[e] times weight[e]."""


class Plain(NamedTuple):
    """Products that stay in the model's dtype where a precision has lower ones for projections and experts."""

    linear: Callable[..., Tensor] = F.linear
    """As `F.linear`: of the vision tower, the projection of hidden states, and logits outside of a loss."""
    attend: Callable[..., Tensor] = F.scaled_dot_product_attention
    """As `F.scaled_dot_product_attention`."""


NATIVE = Plain()


def in_fp32(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A product whose floating-point operands, and in the backward pass gradients, are multiplied in fp32; the results
    are rounded to the dtype of the first operand."""

    @functools.wraps(product)
    def wide(first: Tensor, *others: Any, **options: Any) -> Tensor:
        operands = [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in (first, *others)]
        return product(*operands, **options).type_as(first)

    return wide


MOST_ELEMENTS = 2**31 - 1
"""Rows times columns of one call; kernels of grouped and of scaled products count them in 32 bits."""


def in_pieces(product: Callable[..., Tensor], x: Tensor, weight: Tensor, ends_E: Tensor | None) -> Tensor:
    """A product, grouped or (ends_E None) not, in as many calls as its rows need; they start at multiples of 16."""
    most = MOST_ELEMENTS // max(weight.shape[-2:]) // 16 * 16
    if len(x) <= most:
        return product(x, weight, ends_E)
    done = []
    for i, piece in enumerate(x.split(most)):
        ends = None if ends_E is None else (ends_E - i * most).clamp(0, len(piece))
        done.append(product(piece, weight, ends))
    return torch.cat(done)


def grouped_mm(x: Tensor, weight: Tensor, ends_E: Tensor) -> Tensor:
    """The plain `GroupedFn`: one product per expert in x's dtype; an expert without rows gets a zero gradient."""
    if x.shape[-1] * x.element_size() % 16 or weight.shape[-1] * x.element_size() % 16:
        # The kernel takes no such rows; only toy models have them.
        counts = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
        return torch.cat([rows @ one for rows, one in zip(x.split(counts), weight.unbind())])
    return in_pieces(lambda piece, weight, ends_E: F.grouped_mm(piece, weight, offs=ends_E), x, weight, ends_E)


class Linear(nn.Module):
    """x -> x weight^T through the function it was built with."""

    def __init__(self, inputs: int, outputs: int, linear_fn: Callable[..., Tensor] = F.linear):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.linear_fn = linear_fn

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fn(x, self.weight)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x): a dense layer's feed-forward and the shared expert."""

    def __init__(self, size: int, hidden: int, linear_fn: LinearFn):
        super().__init__()
        self.gate_proj = Linear(size, hidden, linear_fn)
        self.up_proj = Linear(size, hidden, linear_fn)
        self.down_proj = Linear(hidden, size, linear_fn)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
