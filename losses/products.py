"""The head's three products: logits, and the gradients of hidden states and unembedding, each summed in fp32 at least.

Operands below fp32 are multiplied as they are on CUDA; elsewhere they are rounded and multiplied as fp32, which gives
the same numbers but for the order of the sums.
"""

import torch
from torch import Tensor

from losses.rows import pieces


class Products:
    """Of one pass over the head; operands are in the dtype of the hidden states, or in that of autocast.

    Args:
        hidden_TD, weight_VD: as `losses.head.head_loss` takes them.
    """

    def __init__(self, hidden_TD: Tensor, weight_VD: Tensor):
        kind = hidden_TD.device.type
        self.operand = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_TD.dtype
        self.sum = torch.promote_types(self.operand, torch.float32)
        self._native = kind == "cuda" and self.operand != self.sum
        self._hidden_TD = hidden_TD
        self._weight_VD = self._ready(weight_VD)

    def _ready(self, matrix: Tensor) -> Tensor:
        rounded = matrix.to(self.operand)
        return rounded if self._native else rounded.to(self.sum)

    def logits(self, rows: slice, out_tV: Tensor | None = None) -> Tensor:
        hidden_tD = self._ready(self._hidden_TD[rows])
        if out_tV is None:  # a product without one is rounded by autocast
            out_tV = hidden_tD.new_empty(len(hidden_tD), len(self._weight_VD), dtype=self.sum)
        if self._native:
            return torch.mm(hidden_tD, self._weight_VD.T, out_dtype=self.sum, out=out_tV)
        return torch.mm(hidden_tD, self._weight_VD.T, out=out_tV)

    def backward(
        self, rows: slice, grad_tV: Tensor, hidden_grad_TD: Tensor | None, weight_grad_VD: Tensor | None
    ) -> None:
        """Writes the chunk's rows of the one gradient and adds to the other, which the first chunk overwrites.

        Args:
            grad_tV: by the logits; may be rounded in place.
            hidden_grad_TD, weight_grad_VD: in the dtype of sums.
        """
        if self._native or grad_tV.dtype != self.sum:
            grad_tV = self._ready(grad_tV)
        elif self.operand != self.sum:
            for part in pieces(grad_tV):  # no second tensor of the chunk's size
                grad_tV[part] = grad_tV[part].to(self.operand)
        if hidden_grad_TD is not None:
            if self._native:
                torch.mm(grad_tV, self._weight_VD, out_dtype=self.sum, out=hidden_grad_TD[rows])
            else:
                torch.mm(grad_tV, self._weight_VD, out=hidden_grad_TD[rows])
        if weight_grad_VD is not None:
            # A row that counts has no gradient without NaN if its hidden state is not finite; one that does not count
            # adds nothing.
            hidden_tD = torch.nan_to_num(self._ready(self._hidden_TD[rows]), 0.0, 0.0, 0.0)
            fresh = rows.start == 0
            if self._native:
                add_product(weight_grad_VD, grad_tV, hidden_tD, fresh)
            else:
                torch.addmm(weight_grad_VD, grad_tV.T, hidden_tD, beta=0.0 if fresh else 1.0, out=weight_grad_VD)


@torch.library.custom_op("codistill::add_product", mutates_args=("sum_VD",), device_types="cuda")
def add_product(sum_VD: Tensor, grad_tV: Tensor, hidden_tD: Tensor, fresh: bool) -> None:
    """sum [V, D] += gradient [t, V], transposed, times hidden [t, D], both narrower than it; `fresh`: = and not +=."""
    # An operator of its own because torch's has no form for tensors without data, as a rehearsed step needs it.
    torch.addmm(sum_VD, grad_tV.T, hidden_tD, out_dtype=sum_VD.dtype, beta=0.0 if fresh else 1.0, out=sum_VD)


def narrowed(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The contiguous matrix in another dtype; in a narrower one in its own memory, which is overwritten."""
    if dtype.itemsize >= matrix.dtype.itemsize:
        return matrix.to(dtype)
    wide, narrow = matrix.view(-1), matrix.view(-1).view(dtype)[: matrix.numel()]
    narrow[:1] = wide[:1].clone()
    done = 1
    while done < len(wide):  # number n moves from n x width to n x half of it or less: [done, 2 done) lies apart
        narrow[done : 2 * done] = wide[done : 2 * done]
        done *= 2
    return narrow.view_as(matrix)
