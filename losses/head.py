"""The product with the unembedding and a loss on its logits as one function, in chunks of tokens.

The logits of one chunk live at a time. A *row function* turns them into per-token parts and into their own gradient
while they exist, so no [T, V] tensor outlives its chunk and the unembedding is needed once.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from losses.products import Products, narrowed

MOST_ROWS = 4096
"""Of a chunk that is chosen by bytes; products are no faster with more."""
_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}
"""Of the [t, V] tensors of a chunk. Each chunk costs a pass over the gradient of the unembedding in fp32, which these
sizes keep small beside the products."""


class Chunk(NamedTuple):
    """What a row function makes of the logits of t tokens."""

    loss_t: Tensor
    """Weighted loss, nats; its sum over all tokens is what is minimized."""
    parts: dict[str, Tensor]
    """Per-token results [t] for meters and weighting, detached; the same names for every chunk."""
    grad_tV: Tensor | None
    """Gradient of the sum of `loss_t` with respect to the logits, in their dtype or in `want_grad`; None without."""
    selected: Any = None
    """Whatever else was taken out of the chunk; no view of the logits."""


class RowFunction(Protocol):
    """A loss on rows of logits; it holds the labels, weights and targets of all T tokens."""

    def __call__(self, logits_tV: Tensor, rows: slice, want_grad: torch.dtype | None) -> Chunk:
        """
        Args:
            logits_tV: in at least fp32; may be overwritten, by the gradient for instance. The next chunk's lie in the
                same memory, so what is kept of them is a copy.
            rows: which of the T tokens these are.
            want_grad: the dtype that the products take the gradient in; None: no gradient is wanted.
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


def head_loss(hidden_TD: Tensor, weight_VD: Tensor, row_function: RowFunction, *, chunk: int | None = None) -> HeadLoss:
    """A row function over the logits of all tokens.

    Beside the gradients it holds the logits of one chunk, and the unembedding's gradient once, summed in fp32.

    Args:
        hidden_TD: normed hidden states; the head's input.
        weight_VD: unembedding.
        chunk: tokens whose logits live at one time; None: by bytes, `rows_by_bytes`. The result does not depend on it
            beyond rounding.

    Raises:
        ValueError: `chunk` is below 1.

    Source: gradients formed in the forward pass of each chunk, as in Liger-Kernel's chunked losses.
    """
    if chunk is None:
        tensors = getattr(row_function, "tensors", 1)
        chunk = rows_by_bytes(len(hidden_TD), len(weight_VD), hidden_TD.device, tensors)
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; at least 1 token")
    if not torch.is_grad_enabled():  # which a function of autograd does not see, and would make gradients for nothing
        hidden_TD, weight_VD = hidden_TD.detach(), weight_VD.detach()
    names: list[str] = []
    selected: list[Any] = []
    loss_sum, *parts = _Head.apply(hidden_TD, weight_VD, row_function, chunk, names, selected)  # type: ignore[no-untyped-call]
    return HeadLoss(loss_sum, dict(zip(names, parts, strict=True)), selected)


def rows_by_bytes(tokens: int, vocab_size: int, device: torch.device, tensors: int = 1) -> int:
    """Rows of a chunk: chunks are alike, and so many fp32 tensors [t, V] fit the bytes of the device's kind."""
    room = _BYTES.get(device.type, _BYTES["cpu"]) // (4 * vocab_size * tensors)
    most = min(max(room, 1), MOST_ROWS)
    chunks = max(-(-tokens // most), 1)
    alike = -(-tokens // chunks)
    return max(min(-(-alike // 64) * 64, most), 1)


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
        products = Products(hidden_TD, weight_VD)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        want_grad = products.operand if want_hidden or want_weight else None
        # In at least fp32, with one rounding at the end: rounded before and after it is scaled, a gradient is off by up
        # to a third of a percent, in all numbers alike.
        grad_hidden_TD, grad_weight_VD = (
            matrix.new_empty(matrix.shape, dtype=products.sum) if wanted else None
            for matrix, wanted in ((hidden_TD, want_hidden), (weight_VD, want_weight))
        )
        loss_sum = hidden_TD.new_zeros((), dtype=products.sum)
        parts: dict[str, list[Tensor]] = {}
        memory_tV = hidden_TD.new_empty(min(chunk, len(hidden_TD)), len(weight_VD), dtype=products.sum)
        for start in range(0, max(len(hidden_TD), 1), chunk):
            rows = slice(start, min(start + chunk, len(hidden_TD)))
            logits_tV = products.logits(rows, memory_tV[: rows.stop - start])
            done = row_function(logits_tV, rows, want_grad)
            loss_sum += done.loss_t.sum()
            selected.append(done.selected)
            for name, part_t in done.parts.items():
                parts.setdefault(name, []).append(part_t)
            if done.grad_tV is not None:
                products.backward(rows, done.grad_tV, grad_hidden_TD, grad_weight_VD)
        ctx.save_for_backward(grad_hidden_TD, grad_weight_VD)
        ctx.dtypes = hidden_TD.dtype, weight_VD.dtype
        names += parts
        whole = [torch.cat(pieces) for pieces in parts.values()]
        ctx.mark_non_differentiable(*whole)
        return loss_sum, *whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # What a second pass may ask for again is copied; else the gradients are scaled and rounded where they are.
        kept = torch._C._autograd._get_current_graph_task_keep_graph()
        grad_hidden_TD, grad_weight_VD = (
            None if g is None else narrowed(g * grad if kept else g.mul_(grad), dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return grad_hidden_TD, grad_weight_VD, None, None, None, None
