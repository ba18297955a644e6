"""The two passes over rows of logits: one that only reads, for what losses are made of, and one that turns the logits
into their gradient, in place.

On CUDA each is one Triton kernel (`losses.kernels`); this file has the same in torch, a few rows at a time, which stay
in the processor's cache between operations. An id out of range is an error of torch's on the CPU; the kernels read
nothing there and make the row's loss NaN.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

MOST_ATOMS = 64
"""Of a row in the kernels; more are taken by torch."""
_CACHED = 1 << 18
"""Logits of a piece on a CPU: 1 MiB in fp32."""
_HAS_TRITON = find_spec("triton") is not None
_LEAST = -1e30
"""In place of -inf where 0 times it is 0."""


class Seen(NamedTuple):
    """Of each row, in the logits' dtype."""

    lse_t: Tensor
    """Log-sum-exp, nats."""
    most_t: Tensor
    """The largest logit."""
    log_t: Tensor
    """Log-sum-exp less the largest logit: what is left of it where logits are so large that their last digit counts."""
    label_t: Tensor
    """The label's logit."""
    atoms_tK: Tensor | None
    """The atoms' logits."""
    entropy_t: Tensor | None
    """Of the softmax, nats."""
    square_t: Tensor | None
    """Inner product of the softmax with itself."""


class Target(NamedTuple):
    """w_hard at the label and w_soft times the atoms: what the gradient is the distance to."""

    labels_t: Tensor
    w_hard_t: Tensor
    ids_tK: Tensor | None
    probs_tK: Tensor | None
    w_soft_t: Tensor | None


def read(
    logits_tV: Tensor, labels_t: Tensor, ids_tK: Tensor | None, entropy: bool = False, square: bool = False
) -> Seen:
    """The pass that reads; `entropy`, `square`: whether they are wanted."""
    if _fused(logits_tV, ids_tK):
        numbers_6t, atoms_tK = read_rows(logits_tV, labels_t, ids_tK)
        lse_t, most_t, log_t, label_t, entropy_t, square_t = numbers_6t.unbind()
        found_tK = None if ids_tK is None else atoms_tK
        entropy_t, square_t = entropy_t if entropy else None, square_t if square else None
        return Seen(lse_t, most_t, log_t, label_t, found_tK, entropy_t, square_t)
    label_t = logits_tV.gather(-1, labels_t[:, None]).squeeze(-1)
    atoms_tK = None if ids_tK is None else logits_tV.gather(-1, ids_tK)
    most_t, sum_t, entropy_t, square_t = (logits_tV.new_empty(len(logits_tV)) for _ in range(4))
    scratch_rV = torch.empty_like(logits_tV[next(pieces(logits_tV), slice(0))])
    for rows in pieces(logits_tV):
        part_rV = logits_tV[rows]
        most_r = torch.amax(part_rV, -1, out=most_t[rows])
        exp_rV = torch.sub(part_rV, most_r[:, None], out=scratch_rV[: len(part_rV)])
        lower_rV = exp_rV.clamp(min=_LEAST) if entropy else exp_rV
        torch.sum(exp_rV.exp_(), -1, out=sum_t[rows])
        if entropy:
            torch.sum(lower_rV.mul_(exp_rV), -1, out=entropy_t[rows])
        if square:
            torch.sum(exp_rV.square_(), -1, out=square_t[rows])
    log_t = sum_t.log()
    entropy_t = log_t - entropy_t / sum_t if entropy else None
    square_t = square_t / sum_t.square() if square else None
    return Seen(most_t + log_t, most_t, log_t, label_t, atoms_tK, entropy_t, square_t)


def write(logits_tV: Tensor, seen: Seen, target: Target, dtype: torch.dtype) -> Tensor:
    """The gradient, M softmax - target with M the target's sum, in the memory of the logits, which are spent.

    A row whose weights are 0 has gradient 0, whatever its logits are.

    Args:
        dtype: what the gradient is taken in; in it or else in the logits' own it is returned.
    """
    labels_t, w_hard_t, ids_tK, probs_tK, w_soft_t = target
    if _fused(logits_tV, ids_tK):
        write_rows(logits_tV, seen.most_t, seen.log_t, labels_t, w_hard_t, ids_tK, probs_tK, w_soft_t, dtype)
        # A row's gradient lies at the start of what was the row: no second tensor, and a plain stride for the products.
        return logits_tV.view(dtype).narrow(1, 0, logits_tV.shape[1])
    total_t, counts_t, atoms_tK = w_hard_t, w_hard_t != 0, None
    if ids_tK is not None:
        assert probs_tK is not None and w_soft_t is not None, "atoms come with probabilities and a weight"
        atoms_tK = weighted(w_soft_t[:, None], probs_tK)
        total_t, counts_t = total_t + atoms_tK.sum(-1), counts_t | (w_soft_t != 0)
    scale_t = total_t * seen.log_t.neg().exp()
    for rows in pieces(logits_tV):
        logits_tV[rows].sub_(seen.most_t[rows, None]).exp_().mul_(scale_t[rows, None])
        silence(logits_tV[rows], counts_t[rows])
    logits_tV.scatter_add_(-1, labels_t[:, None], -w_hard_t[:, None])
    if ids_tK is not None and atoms_tK is not None:
        logits_tV.scatter_add_(-1, ids_tK, -atoms_tK)
    return logits_tV


def silence(grad_tV: Tensor, counts_t: Tensor) -> Tensor:
    """Makes rows that do not count 0, whatever they hold; in place."""
    # On a CPU the answer is at hand, and as a rule all rows count.
    if grad_tV.device.type == "cpu" and counts_t.all():
        return grad_tV
    return grad_tV.masked_fill_(~counts_t[:, None], 0.0)


def weighted(weight: Tensor, value: Tensor) -> Tensor:
    """Their product; 0 where the weight is 0, whatever the value is."""
    return torch.where(weight == 0, 0.0, weight * value)


def pieces(logits_tV: Tensor) -> Iterator[slice]:
    """Rows that fit a processor's cache, in order; on other devices all at once."""
    rows, width = logits_tV.shape
    step = max(1, _CACHED // max(width, 1)) if logits_tV.device.type == "cpu" else max(rows, 1)
    return (slice(start, start + step) for start in range(0, rows, step))


def _fused(logits_tV: Tensor, ids_tK: Tensor | None) -> bool:
    fits = ids_tK is None or ids_tK.shape[1] <= MOST_ATOMS
    return logits_tV.is_cuda and logits_tV.dtype == torch.float32 and fits and _HAS_TRITON


@torch.library.custom_op("codistill::read_rows", mutates_args=())
def read_rows(logits_tV: Tensor, labels_t: Tensor, ids_tK: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-sum-exp, largest, their difference, label's logit, entropy, square [6, t]; logits of the atoms [t, K]."""
    from losses.kernels import read

    return read(logits_tV, labels_t, ids_tK)


@read_rows.register_fake
def _(logits_tV: Tensor, labels_t: Tensor, ids_tK: Tensor | None) -> tuple[Tensor, Tensor]:
    tokens, atoms = len(logits_tV), 0 if ids_tK is None else ids_tK.shape[1]
    return logits_tV.new_empty(6, tokens), logits_tV.new_empty(tokens, atoms)


@torch.library.custom_op("codistill::write_rows", mutates_args=("logits_tV",))
def write_rows(
    logits_tV: Tensor,
    most_t: Tensor,
    log_t: Tensor,
    labels_t: Tensor,
    w_hard_t: Tensor,
    ids_tK: Tensor | None,
    probs_tK: Tensor | None,
    w_soft_t: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """The gradient over the logits; in a narrower dtype it lies at the start of each row's memory."""
    from losses.kernels import write

    write(logits_tV, most_t, log_t, labels_t, w_hard_t, ids_tK, probs_tK, w_soft_t, dtype)
