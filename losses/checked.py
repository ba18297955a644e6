"""What a row function is given, looked at before it is used. Looking waits for the device, so it is for debugging."""

import torch
from torch import Tensor

from losses.head import Chunk, RowFunction
from losses.mixed import Weigh

MOST_MASS = 2.0
"""Of a row of atoms. The mass of a sampled row is 1 on average, and above it by less than its least atom."""


class Checked:
    """A row function whose labels, atoms and weights are checked, chunk by chunk, as far as it has any.

    Raises:
        ValueError: an id is not one of the vocabulary, a probability or weight is not a number from 0 to 1, or a row's
            mass is above `MOST_MASS`.
    """

    def __init__(self, row_function: RowFunction):
        self._rows = row_function
        self.tensors = getattr(row_function, "tensors", 1)

    def __call__(self, logits_tV: Tensor, rows: slice, want_grad: torch.dtype | None) -> Chunk:
        row_function, last = self._rows, float(logits_tV.shape[1] - 1)
        for name, most in (("labels_T", last), ("ids_TK", last), ("probs_TK", 1.0)):
            if (part := getattr(row_function, name, None)) is not None:
                _need(name, part[rows], most, rows.start)
        if (probs_TK := getattr(row_function, "probs_TK", None)) is not None:
            _need("mass", probs_TK[rows].sum(-1), MOST_MASS, rows.start)
        if hasattr(row_function, "weigh") and hasattr(row_function, "_replace"):
            row_function = row_function._replace(weigh=_checked(row_function.weigh))
        return row_function(logits_tV, rows, want_grad)


def _checked(weigh: Weigh) -> Weigh:
    def checked(rows: slice, hard_t: Tensor, soft_t: Tensor | None) -> tuple[Tensor, Tensor | None]:
        w_hard_t, w_soft_t = weigh(rows, hard_t, soft_t)
        _need("w_hard", w_hard_t, 1.0, rows.start)
        if w_soft_t is not None:
            _need("w_soft (alpha)", w_soft_t, 1.0, rows.start)
        return w_hard_t, w_soft_t

    return checked


def _need(name: str, part: Tensor, most: float, first: int) -> None:
    """Every number is in [0, most]; rows of the part are tokens from `first` on."""
    wrong = ~((part >= 0) & (part <= most))
    if wrong.any():
        token, *place = wrong.nonzero()[0].tolist()
        where = ", ".join(map(str, [first + token, *place]))
        raise ValueError(f"{name}[{where}] is {part[tuple([token, *place])].item():g}; allowed: 0 to {most:g}")
