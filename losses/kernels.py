"""The two passes of `losses.rows` in Triton: one program a row, each pass reads the row once, bound by memory.

A row of 202,048 logits fits neither registers nor shared memory, so it is read twice, with the weights of its token
made in between: once for maximum, sums and argmax together, each lane on its own until the end, and once for the
gradient. An id out of range is never followed: what it stands for is NaN.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Launch(NamedTuple):
    """How a pass is cut; a program takes `depth` x `lanes` logits at a time."""

    depth: int
    """Logits that a lane takes at once."""
    lanes: int
    warps: int


READ = Launch(depth=8, lanes=512, warps=4)
WRITE = Launch(depth=1, lanes=4096, warps=8)
NUMBERS = 6
"""Log-sum-exp, largest logit, their difference, label's logit, entropy, square; in the order of `losses.rows.Seen`."""


def read(logits_tV: Tensor, labels_t: Tensor, ids_tK: Tensor | None, launch: Launch = READ) -> tuple[Tensor, Tensor]:
    """As `losses.rows.read_rows`."""
    tokens, width = logits_tV.shape
    atoms = 0 if ids_tK is None else ids_tK.shape[1]
    numbers_6t = logits_tV.new_empty(NUMBERS, tokens)
    found_tK = logits_tV.new_empty(tokens, atoms)
    labels_t = labels_t.contiguous()
    ids = labels_t if ids_tK is None else ids_tK.contiguous()
    if tokens:
        _read[(tokens,)](
            logits_tV, labels_t, ids, numbers_6t, found_tK, tokens, width, logits_tV.stride(0),
            ATOMS=atoms, ROOM=triton.next_power_of_2(max(atoms, 1)),
            DEPTH=launch.depth, LANES=launch.lanes, num_warps=launch.warps,
        )  # fmt: skip
    return numbers_6t, found_tK


def write(
    logits_tV: Tensor,
    most_t: Tensor,
    log_t: Tensor,
    labels_t: Tensor,
    w_hard_t: Tensor,
    ids_tK: Tensor | None,
    probs_tK: Tensor | None,
    w_soft_t: Tensor | None,
    dtype: torch.dtype,
    launch: Launch = WRITE,
) -> None:
    """As `losses.rows.write_rows`."""
    tokens, width = logits_tV.shape
    atoms = 0 if ids_tK is None else ids_tK.shape[1]
    most_t, log_t, labels_t, w_hard_t = (x.contiguous() for x in (most_t, log_t, labels_t, w_hard_t))
    ids, probs, w_soft = (
        like if part is None else part.contiguous()
        for part, like in ((ids_tK, labels_t), (probs_tK, w_hard_t), (w_soft_t, w_hard_t))
    )
    grad_tV = logits_tV.view(dtype)
    if tokens:
        _write[(tokens,)](
            logits_tV, grad_tV, most_t, log_t, labels_t, w_hard_t, ids, probs, w_soft, width,
            logits_tV.stride(0), grad_tV.stride(0),
            ATOMS=atoms, ROOM=triton.next_power_of_2(max(atoms, 1)),
            BLOCK=launch.depth * launch.lanes, num_warps=launch.warps,
        )  # fmt: skip


@triton.jit
def _read(
    logits, labels, ids, numbers, found, tokens, width, stride,
    ATOMS: tl.constexpr, ROOM: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    places = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    none = float("-inf")
    most = tl.full([LANES], none, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    inner = tl.zeros([LANES], tl.float32)
    square = tl.zeros([LANES], tl.float32)
    for start in range(0, width, DEPTH * LANES):
        at = start + places
        z = tl.load(logits + at, mask=at < width, other=none).to(tl.float32)
        high = tl.maximum(most, tl.max(z, 0))
        # Not -inf minus -inf where a lane has seen nothing yet.
        base = tl.where(high == none, 0.0, high)
        lower = z - base[None, :]
        e = tl.exp(lower)
        shrink = tl.exp(most - base)
        moved = tl.where(shrink == 0.0, 0.0, most - base)
        inner = shrink * (inner + moved * total) + tl.sum(tl.where(e == 0.0, 0.0, e * lower), 0)
        total = shrink * total + tl.sum(e, 0)
        square = shrink * shrink * square + tl.sum(e * e, 0)
        most = high
    high = tl.max(most, 0)
    base = tl.where(high == none, 0.0, high)
    shrink = tl.exp(most - base)
    moved = tl.where(shrink == 0.0, 0.0, most - base)
    inner = tl.sum(shrink * (inner + moved * total), 0)
    square = tl.sum(shrink * shrink * square, 0)
    total = tl.sum(shrink * total, 0)
    log = tl.log(total)

    label = tl.load(labels + row)
    at_label = tl.load(logits + label, mask=(label >= 0) & (label < width), other=float("nan")).to(tl.float32)
    numbers += row
    tl.store(numbers, high + log)
    tl.store(numbers + tokens, high)
    tl.store(numbers + 2 * tokens, log)
    tl.store(numbers + 3 * tokens, at_label)
    tl.store(numbers + 4 * tokens, log - inner / total)
    tl.store(numbers + 5 * tokens, square / (total * total))
    if ATOMS > 0:
        k = tl.arange(0, ROOM)
        atom = tl.load(ids + row * ATOMS + k, mask=k < ATOMS, other=-1)
        z = tl.load(logits + atom, mask=(atom >= 0) & (atom < width), other=float("nan")).to(tl.float32)
        tl.store(found + row * ATOMS + k, z, mask=k < ATOMS)


@triton.jit
def _write(
    logits, grads, mosts, logs, labels, w_hards, ids, probs, w_softs, width, stride, grad_stride,
    ATOMS: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    grads += row * grad_stride
    most = tl.load(mosts + row)
    w_hard = tl.load(w_hards + row)
    counts = w_hard != 0.0
    total = w_hard
    # What the label and the atoms get is made before anything is written: ids that repeat get one sum each.
    label = tl.load(labels + row)
    label_fits = (label >= 0) & (label < width)
    at_label = tl.load(logits + label, mask=label_fits, other=float("nan")).to(tl.float32)
    label_less = w_hard
    if ATOMS > 0:
        k = tl.arange(0, ROOM)
        w_soft = tl.load(w_softs + row)
        counts = counts | (w_soft != 0.0)
        atom = tl.load(ids + row * ATOMS + k, mask=k < ATOMS, other=-1)
        atom_fits = (atom >= 0) & (atom < width)
        at_atom = tl.load(logits + atom, mask=atom_fits, other=float("nan")).to(tl.float32)
        mass = tl.load(probs + row * ATOMS + k, mask=k < ATOMS, other=0.0)
        mass = tl.where(w_soft == 0.0, 0.0, w_soft * mass)
        total += tl.sum(mass, 0)
        same = atom[:, None] == atom[None, :]
        atom_less = tl.sum(tl.where(same, mass[None, :], 0.0), 1) + tl.where(atom == label, w_hard, 0.0)
        label_less += tl.sum(tl.where(atom == label, mass, 0.0), 0)
        # An atom with the label's id writes the same sum, but maybe with another last bit: one of them writes.
        label_fits = label_fits & (tl.sum((atom == label).to(tl.int32), 0) == 0)
    scale = total * tl.exp(-tl.load(logs + row))
    if ATOMS > 0:
        atom_grad = tl.where(counts, scale * tl.exp(at_atom - most) - atom_less, 0.0)
    label_grad = tl.where(counts, scale * tl.exp(at_label - most) - label_less, 0.0)

    places = tl.arange(0, BLOCK)
    readable = tl.where(counts, width, 0)
    for start in range(0, width, BLOCK):
        at = start + places
        z = tl.load(logits + at, mask=at < readable, other=0.0).to(tl.float32)
        grad = tl.where(counts, scale * tl.exp(z - most), 0.0)
        # A narrower gradient lies over logits of this block and earlier ones: all lanes have read theirs.
        tl.debug_barrier()
        tl.store(grads + at, grad.to(grads.dtype.element_ty), mask=at < width)
    tl.debug_barrier()
    tl.store(grads + label, label_grad.to(grads.dtype.element_ty), mask=label_fits)
    if ATOMS > 0:
        tl.store(grads + atom, atom_grad.to(grads.dtype.element_ty), mask=atom_fits)
