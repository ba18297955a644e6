"""FP8 products for projections and experts: forward and backward, with casts of the weights kept for a whole step.

Router, embedding, head, norms and the vision tower never go through here. Both operands are cast from bf16 by row
(`rowwise`), or as a whole (`tensor`: less work, which narrow widths need to gain anything; gradients are then e5m2, of
wider range). Experts are cast by row in either: their kernel has no other scales. The gradient of a weight sums over
tokens; with `grad_weight: high` its operands stay bf16.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from distill.config.schema import Fp8GradWeight, Fp8Recipe, PrecisionConfig
from distill.model.casts import Cast, columns, columns_of_groups, rows, scale_of_all
from distill.model.fp8_format import ALIGNED, E4M3, E5M2
from distill.model.linear import in_pieces
from distill.model.precision import Numerics, bf16
from distill.model.scaled import Operand, operand, product


def numerics(config: PrecisionConfig, device: torch.device) -> Numerics:
    """Like bf16 in all but projections and experts."""
    product = Fp8(config.recipe is Fp8Recipe.tensor, config.grad_weight is Fp8GradWeight.high)
    return bf16(config, device)._replace(linear_fn=product.linear, grouped_fn=product.grouped, multiple=ALIGNED)


class Fp8:
    """The two products with one recipe; `linear` is a `LinearFn`, `grouped` a `GroupedFn`.

    Args:
        whole: one scale for each operand of a 2-D product, instead of one a row.
        grad_weight_high: the weights' gradients are products in bf16.
    """

    def __init__(self, whole: bool, grad_weight_high: bool):
        self.whole, self.grad_weight_high = whole, grad_weight_high
        self.weights = Kept()
        self._last: tuple[Any, int, Operand] | None = None

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [..., in] times weight [out, in] transposed."""
        return self._in_pieces(x.flatten(0, -2), weight, None).unflatten(0, x.shape[:-1])

    def grouped(self, x: Tensor, weight: Tensor, ends_E: Tensor) -> Tensor:
        """x [R, in] by group times weight [E, in, out]; groups end at multiples of 16."""
        return self._in_pieces(x, weight, ends_E)

    def _in_pieces(self, x: Tensor, weight: Tensor, ends_E: Tensor | None) -> Tensor:
        return in_pieces(lambda *piece: _Product.apply(*piece, self), x, weight, ends_E)

    def rows(self, x: Tensor) -> Operand:
        """Of activations; projections that share an input, as gate and up, share its cast."""
        version = 0 if x.is_inference() else x._version
        if self._last is None or self._last[0]() is not x or self._last[1] != version:
            self._last = weakref.ref(x), version, self.cast(rows, x)
        return self._last[2]

    def cast(self, by: Callable[..., Cast], x: Tensor, *, grouped: bool = False, dtype: torch.dtype = E4M3) -> Operand:
        """With the recipe's scales: by row for groups, and as the recipe has it for what is 2-D."""
        whole = self.whole and not grouped
        dtype = dtype if whole else E4M3
        return operand(by(x, dtype, scale_of_all(x, dtype) if whole else None))

    def gradient_of_weight(self, x: Tensor, g: Tensor, ends_E: Tensor | None) -> Tensor:
        """In the weight's shape: [out, in], or with groups [E, in, out]."""
        first, second = (g, x) if ends_E is None else (x, g)
        if self.grad_weight_high:
            return _plain_gradient(first, second, ends_E)
        if ends_E is None:
            return product(self.cast(columns, g, dtype=E5M2), self.cast(columns, x), fast=False)
        a, b = (operand(columns_of_groups(each, ends_E)) for each in (first, second))
        return product(a, b, ends_E)


class Kept:
    """Casts of weights, each made once: until the weight is changed in place, or moved.

    What changes a weight behind autograd's back, as torch's fused optimizers and DeepSpeed do, must say so
    (`torch.autograd.graph.increment_version`).
    """

    def __init__(self) -> None:
        self._of = WeakTensorKeyDictionary()

    def get(self, weight: Tensor, by: Callable[..., Cast], cast: Callable[..., Operand]) -> Operand:
        """The cast of a weight along one of its dimensions, which `by` stands for."""
        if weight.is_inference():  # has no version
            return cast(by, weight, grouped=weight.ndim == 3)
        state = weight._version, weight.dtype, weight.device
        kept = self._of.get(weight)
        if kept is None or kept[0] != state:
            self._of[weight] = kept = state, {}
        made: dict[Callable[..., Cast], Operand] = kept[1]
        if by not in made:
            with torch.inference_mode(False), torch.no_grad():  # a pass that trains may need what labelling has made
                made[by] = cast(by, weight.detach(), grouped=weight.ndim == 3)
        return made[by]


class _Product(torch.autograd.Function):
    # A weight [out, in] is contracted over its last dimension going forward and over the other going back; the experts'
    # [E, in, out] the other way round.

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends_E: Tensor | None, fp8: Fp8) -> Tensor:
        ctx.save_for_backward(x, weight, ends_E)
        ctx.fp8, ctx.weight = fp8, weight  # activation checkpointing hands a saved tensor back as another object
        first = fp8.rows(x) if ends_E is None else fp8.cast(rows, x, grouped=True)
        return product(first, fp8.weights.get(weight, rows if ends_E is None else columns, fp8.cast), ends_E).type_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, ends_E = ctx.saved_tensors
        fp8, gx, gw = ctx.fp8, None, None
        if ctx.needs_input_grad[0]:
            first = fp8.cast(rows, g, grouped=ends_E is not None, dtype=E5M2)
            second = fp8.weights.get(ctx.weight, columns if ends_E is None else rows, fp8.cast)
            gx = product(first, second, ends_E, fast=False).type_as(x)
        if ctx.needs_input_grad[1]:
            gw = fp8.gradient_of_weight(x, g, ends_E).type_as(weight)
        return gx, gw, None, None


def _plain_gradient(first: Tensor, second: Tensor, ends_E: Tensor | None) -> Tensor:
    """first^T second of bf16 operands, [M, N] or [E, M, N]; on a CPU multiplied in fp32."""
    wide = torch.bfloat16 if first.is_cuda else torch.float32
    a, b = (each.bfloat16().to(wide) for each in (first, second))
    return a.mT @ b if ends_E is None else F.grouped_mm(a.mT, b, offs=ends_E)
