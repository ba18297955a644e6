"""Soft and hard loss of a token as one cross entropy against a mixed target.

    w_h CE(e_y, z) + w_s CE(p, z) = CE(m, z)          with m = w_h e_y + w_s p
                                  = M lse(z) - sum_i m_i z_i,   M = w_h + w_s sum_i p_i
    gradient with respect to z    = M softmax(z) - m

so any weighting of sparse soft targets costs what a hard label costs, with K + 1 gathered logits in place of one.
M is not assumed to be 1: the mass of a sampled row is 1 only on average.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from losses.head import Chunk, head_loss
from losses.rows import Seen, Target, read, weighted, write

Select = Callable[[slice, Tensor, Tensor], Any]
"""(rows, logits [t, V], their log-sum-exp [t]) -> what is taken out of a chunk; both tensors are read only."""
Weigh = Callable[[slice, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
"""(rows, cross entropy against the label [t], against the soft target [t]; both in nats) -> weights of the hard and of
the soft term [t], constants for the gradient; no soft ones where there are no soft targets. An invalid token has 0."""


def fixed(w_hard_T: Tensor, w_soft_T: Tensor | None = None) -> Weigh:
    """Weights that do not depend on what the model predicts."""
    return lambda rows, hard_t, soft_t: (w_hard_T[rows], None if w_soft_T is None else w_soft_T[rows])


def both_weights(weigh: Weigh, rows: slice, hard_t: Tensor, soft_t: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of a chunk with soft targets, in the dtype of its losses."""
    w_hard_t, w_soft_t = weigh(rows, hard_t, soft_t)
    assert w_soft_t is not None, "soft targets come with a weight"
    return w_hard_t.to(hard_t.dtype), w_soft_t.to(hard_t.dtype)


class Mixed(NamedTuple):
    """Row function of w_hard CE(label) + w_soft CE(atoms).

    Its parts are `hard`, cross entropy against the label, and with atoms `soft`, cross entropy against them (both
    unweighted, nats), `mass`, the sum of the stored probabilities, and `agreement`, whether the most probable id of the
    atoms is one of the model's. With `norms` also `hard_norm` and `soft_norm`, Euclidean norms of both terms' gradients
    with respect to the logits, unweighted; with `entropy` that of the model's distribution, nats.

    Source: for one weight, the merged target of sparse distillation (arXiv 2503.16870, appendix).
    """

    labels_T: Tensor
    """Next-token ids in [0, V); an invalid token has any such id and weights 0."""
    weigh: Weigh
    ids_TK: Tensor | None = None
    """Stored atoms; padding has probability 0 and any id in [0, V); an id that occurs twice counts twice."""
    probs_TK: Tensor | None = None
    select: Select | None = None
    """Called without gradient on every chunk; its result is the chunk's selection."""
    norms: bool = False
    """Atoms of a token have distinct ids then."""
    entropy: bool = False
    """Whether `entropy` is among the parts."""

    def __call__(self, logits_tV: Tensor, rows: slice, want_grad: torch.dtype | None) -> Chunk:
        dtype = logits_tV.dtype
        labels_t, ids_tK, probs_tK = self.labels_T[rows], None, None
        if self.ids_TK is not None:
            assert self.probs_TK is not None, "atoms come with probabilities"
            ids_tK, probs_tK = self.ids_TK[rows], self.probs_TK[rows].to(dtype)
        seen = read(logits_tV, labels_t, ids_tK, self.entropy, self.norms)
        # In this order, as the largest logit and the label's may be large and close.
        hard_t, soft_t = (seen.most_t - seen.label_t) + seen.log_t, None
        parts = {"hard": hard_t}
        if probs_tK is not None:
            parts |= _of_atoms(seen, probs_tK)
            soft_t = parts["soft"]
        if seen.entropy_t is not None:
            parts["entropy"] = seen.entropy_t
        if seen.square_t is not None:
            parts["hard_norm"] = hard_norm(seen.square_t, hard_t)
            if probs_tK is not None:
                parts["soft_norm"] = _distance(seen, probs_tK)

        if soft_t is None:
            w_hard_t, w_soft_t = self.weigh(rows, hard_t, None)[0].to(dtype), None
            loss_t = weighted(w_hard_t, hard_t)
        else:
            w_hard_t, w_soft_t = both_weights(self.weigh, rows, hard_t, soft_t)
            loss_t = weighted(w_hard_t, hard_t) + weighted(w_soft_t, soft_t)
        selected = None if self.select is None else self.select(rows, logits_tV, seen.lse_t)
        if want_grad is None:
            return Chunk(loss_t, parts, None, selected)
        target = Target(labels_t, w_hard_t, ids_tK, probs_tK, w_soft_t)
        return Chunk(loss_t, parts, write(logits_tV, seen, target, want_grad), selected)


def _of_atoms(seen: Seen, probs_tK: Tensor) -> dict[str, Tensor]:
    assert seen.atoms_tK is not None
    mass_t = probs_tK.sum(-1)
    soft_t = weighted(probs_tK, seen.most_t[:, None] - seen.atoms_tK).sum(-1) + mass_t * seen.log_t
    best_t = seen.atoms_tK.gather(-1, probs_tK.argmax(-1, keepdim=True)).squeeze(-1)
    return {"soft": soft_t, "mass": mass_t, "agreement": (best_t >= seen.most_t) & (mass_t > 0)}


def hard_norm(square_t: Tensor, hard_t: Tensor) -> Tensor:
    """Euclidean norm of the gradient of a label's cross entropy by the logits, [t]; square_t: inner product of the
    softmax with itself."""
    return (square_t - 2.0 * hard_t.neg().exp() + 1.0).clamp(min=0.0).sqrt()


def _distance(seen: Seen, atoms_tK: Tensor) -> Tensor:
    """Euclidean norm of (sum of the atoms) x softmax - atoms, [t], by its three inner products."""
    assert seen.atoms_tK is not None and seen.square_t is not None
    mass_t = atoms_tK.sum(-1)
    probs_tK = (seen.atoms_tK - seen.most_t[:, None] - seen.log_t[:, None]).exp()
    inner_t = weighted(atoms_tK, probs_tK).sum(-1)
    whole_t = mass_t.square() * seen.square_t - 2.0 * mass_t * inner_t + atoms_tK.square().sum(-1)
    return whole_t.clamp(min=0.0).sqrt()


class MixedLoss(NamedTuple):
    """`loss_sum`, scalar in nats, carries the gradient; the parts of `Mixed` are detached (soft ones: None without
    atoms)."""

    loss_sum: Tensor
    hard_T: Tensor
    soft_T: Tensor | None
    mass_T: Tensor | None
    agree_T: Tensor | None
    selected: list[Any]


def mixed_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    w_hard_T: Tensor,
    ids_TK: Tensor | None = None,
    probs_TK: Tensor | None = None,
    w_soft_T: Tensor | None = None,
    *,
    chunk: int | None = None,
    select: Select | None = None,
) -> MixedLoss:
    """`head_loss` of `Mixed`: sum over tokens of w_hard CE(label) + w_soft CE(atoms), and its unweighted parts.

    Args:
        hidden_TD, weight_VD, chunk: as `head_loss` takes them.
        labels_T, ids_TK, probs_TK, select: fields of `Mixed`.
        w_hard_T, w_soft_T: weights of its two terms.
    """
    rows = Mixed(labels_T, fixed(w_hard_T, w_soft_T), ids_TK, probs_TK, select)
    loss_sum, parts, selected = head_loss(hidden_TD, weight_VD, rows, chunk=chunk)
    return MixedLoss(loss_sum, parts["hard"], parts.get("soft"), parts.get("mass"), parts.get("agreement"), selected)
