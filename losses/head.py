"""The product with the unembedding and a loss on its logits as one function, in chunks of tokens.

The logits of one chunk live at a time. A *row function* turns them into per-token parts and into their own gradient
while they exist, so no [T, V] tensor outlives its chunk and the unembedding is needed once.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Chunk(NamedTuple):
    """What a row function makes of the logits of t tokens."""

    loss_t: Tensor
    """Weighted loss, nats; its sum over all tokens is what is minimized."""
    parts: dict[str, Tensor]
    """Per-token results [t] for meters and weighting, detached; the same names for every chunk."""
    grad_tV: Tensor | None
    """Gradient of the sum of `loss_t` with respect to the logits; None without `want_grad`."""
    selected: Any = None
    """Whatever else was taken out of the chunk."""


class RowFunction(Protocol):
    """A loss on rows of logits; it holds the labels, weights and targets of all T tokens."""

    def __call__(self, logits_tV: Tensor, rows: slice, want_grad: bool) -> Chunk:
        """
        Args:
            logits_tV: in at least fp32; may be overwritten, by the gradient for instance.
            rows: which of the T tokens these are.
        """
        ...


class HeadLoss(NamedTuple):
    """`loss_sum` carries the gradient to hidden states and unembedding; everything else is detached."""

    loss_sum: Tensor
    """Scalar, nats, weighted and summed over tokens; the engine divides it once."""
    parts: dict[str, Tensor]
    """[T] each."""
    selected: list[Any]
    """Of each chunk, in order."""


def head_loss(hidden_TD: Tensor, weight_VD: Tensor, row_function: RowFunction, *, chunk: int = 4096) -> HeadLoss:
    """A row function over the logits of all tokens.

    Args:
        hidden_TD: normed hidden states; the head's input.
        weight_VD: unembedding.
        chunk: tokens whose logits live at one time; the result does not depend on it beyond rounding.

    Source: gradients formed in the forward pass of each chunk, as in Liger-Kernel's chunked losses.
    """
    names: list[str] = []
    selected: list[Any] = []
    loss_sum, *parts = _Head.apply(hidden_TD, weight_VD, row_function, chunk, names, selected)  # type: ignore[no-untyped-call]
    return HeadLoss(loss_sum, dict(zip(names, parts, strict=True)), selected)


class _Head(torch.autograd.Function):
    """Autograd takes and returns tensors alone, so names and selections leave through the two lists."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        row_function: RowFunction,
        chunk: int,
        names: list[str],
        selected: list[Any],
    ) -> tuple[Tensor, ...]:
        dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden_TD = torch.empty_like(hidden_TD) if want_hidden else None
        # The sum over chunks is kept in at least fp32; one rounding to the weight's dtype comes at the end.
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=dtype) if want_weight else None
        loss_sum = hidden_TD.new_zeros((), dtype=dtype)
        parts: dict[str, list[Tensor]] = {}
        for start in range(0, max(len(hidden_TD), 1), chunk):
            rows = slice(start, start + chunk)
            hidden_tD = hidden_TD[rows]
            logits_tV = (hidden_tD @ weight_VD.T).to(dtype)
            done = row_function(logits_tV, rows, want_hidden or want_weight)
            loss_sum += done.loss_t.sum()
            selected.append(done.selected)
            for name, part_t in done.parts.items():
                parts.setdefault(name, []).append(part_t)
            if done.grad_tV is None:
                continue
            grad_tV = done.grad_tV.to(hidden_TD.dtype)
            if grad_hidden_TD is not None:
                torch.mm(grad_tV, weight_VD, out=grad_hidden_TD[rows])
            if grad_weight_VD is not None:
                grad_weight_VD += grad_tV.T @ hidden_tD
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        ctx.save_for_backward(grad_hidden_TD, grad_weight_VD)
        names += parts
        whole = [torch.cat(pieces) for pieces in parts.values()]
        ctx.mark_non_differentiable(*whole)
        return loss_sum, *whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_TD, grad_weight_VD = ctx.saved_tensors
        scaled = [None if g is None else g * grad.to(g.dtype) for g in (grad_hidden_TD, grad_weight_VD)]
        return (*scaled, None, None, None, None)
