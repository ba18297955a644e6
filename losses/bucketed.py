"""Divergences from top-k targets: k atoms, and one bucket with the mass of all other ids.

Both distributions have k + 1 outcomes, and the student's bucket is the log-sum-exp of its logits outside of the atoms,
not 1 minus a sum. So they are exact distributions, and losses that are not linear in p are defined on them; what they
do not see is how the mass within the bucket is spread, and its gradient leaves that as it is.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from losses.divergences import LEAST, through_softmax
from losses.head import Chunk
from losses.mixed import Weigh, both_weights, hard_norm
from losses.rows import silence, weighted

Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Of `losses.divergences`, its own numbers bound."""
LEAST_REST = 1e-6
"""The bucket's mass where the stored one is less: the resolution of codec `topk`. A softmax never gives 0."""


class Bucketed(NamedTuple):
    """Row function of w_hard CE(label) + w_soft temperature^2 D(p, q), p and q over the atoms and the bucket.

    The temperature makes both flatter, p^(1/temperature) and q^(1/temperature) over their sums, as they are over the
    k + 1 outcomes; its square keeps the size of the gradient (Hinton et al., arXiv 1503.02531). The parts are those of
    `losses.mixed.Mixed`; `soft` is temperature^2 D.
    """

    labels_T: Tensor
    """Next-token ids in [0, V); an invalid token has any such id and weights 0."""
    weigh: Weigh
    ids_TK: Tensor
    """Stored atoms, each id once. One of probability 0 (padding, any id in [0, V)) belongs to the bucket."""
    probs_TK: Tensor
    """1 minus their sum is the mass of all other ids."""
    divergence: Divergence
    temperature: float = 1.0
    norms: bool = False
    """As of `losses.mixed.Mixed`."""

    @property
    def tensors(self) -> int:
        """[t, V] tensors that live at one time; the log-sum-exp of the bucket makes a second one."""
        return 2

    def __call__(self, logits_tV: Tensor, rows: slice, want_grad: torch.dtype | None) -> Chunk:
        dtype = logits_tV.dtype
        labels_t1, ids_tK, probs_tK = self.labels_T[rows, None], self.ids_TK[rows], self.probs_TK[rows].to(dtype)
        mass_t, real_tK = probs_tK.sum(-1), probs_tK > 0
        best_t = ids_tK.gather(-1, probs_tK.argmax(-1, keepdim=True)).squeeze(-1)
        agreement_t = (logits_tV.argmax(-1) == best_t) & (mass_t > 0)
        label_t = logits_tV.gather(-1, labels_t1).squeeze(-1)
        atoms_tK = logits_tV.gather(-1, ids_tK).masked_fill_(~real_tK, LEAST)
        # A sum and not a plain write: padding may repeat the id of an atom.
        logits_tV.scatter_add_(-1, ids_tK, torch.where(real_tK, -torch.inf, 0.0).to(dtype))
        rest_t = logits_tV.logsumexp(-1)
        has_rest_t = rest_t > -torch.inf
        rest_t = torch.where(has_rest_t, rest_t, LEAST)

        student_tN = torch.cat([atoms_tK, rest_t[:, None]], -1)
        lse_t = student_tN.logsumexp(-1)
        student_tN = (student_tN - lse_t[:, None]).clamp_(min=LEAST)
        stored_t = torch.where(has_rest_t, (1.0 - mass_t).clamp(min=LEAST_REST), 0.0)
        teacher_tN = torch.cat([probs_tK, stored_t[:, None]], -1).log()
        teacher_tN, soft_tN = (_tempered(x, self.temperature) for x in (teacher_tN, student_tN))
        loss_t, grad_tN = self.divergence(teacher_tN, soft_tN)
        hard_t, soft_t = lse_t - label_t, self.temperature**2 * loss_t
        parts = {"hard": hard_t, "soft": soft_t, "mass": mass_t, "agreement": agreement_t}
        w_hard_t, w_soft_t = both_weights(self.weigh, rows, hard_t, soft_t)
        loss_t = weighted(w_hard_t, hard_t) + weighted(w_soft_t, soft_t)
        if want_grad is None:
            return Chunk(loss_t, parts, None)

        # The derivative of temperature^2 D by the k + 1 logits sums to 0, so it is that by log q at temperature 1, too.
        soft_grad_tN = self.temperature * through_softmax(grad_tN, soft_tN.exp())
        probs_tN = student_tN.exp()
        grad_tN = w_hard_t[:, None] * probs_tN + weighted(w_soft_t[:, None], soft_grad_tN)
        # In place: of an id in the bucket it is the bucket's, by the id's share of the bucket.
        share_tV = logits_tV.sub_(rest_t[:, None]).exp_()
        if self.norms:
            share_t = share_tV.square().sum(-1)
            parts["hard_norm"] = hard_norm(_square(probs_tN, share_t), hard_t)
            parts["soft_norm"] = _square(soft_grad_tN, share_t).sqrt()
        grad_tV = share_tV.mul_(grad_tN[:, -1:])
        grad_tV.scatter_add_(-1, ids_tK, torch.where(real_tK, grad_tN[:, :-1], 0.0))
        grad_tV.scatter_add_(-1, labels_t1, -w_hard_t[:, None])
        return Chunk(loss_t, parts, silence(grad_tV, (w_hard_t != 0) | (w_soft_t != 0)))


def _square(part_tN: Tensor, share_t: Tensor) -> Tensor:
    """Inner product with itself, [t], of what has these values at the atoms, and at the ids of the bucket the last one
    by their shares; share_t: inner product of the shares with themselves."""
    square_tN = part_tN.square()
    return square_tN[:, :-1].sum(-1) + square_tN[:, -1] * share_t


def _tempered(logprobs_tN: Tensor, temperature: float) -> Tensor:
    """Logarithms of the distribution to the power 1 / temperature, over its sum."""
    return (logprobs_tN.clamp(min=LEAST) / temperature).log_softmax(-1).clamp_(min=LEAST)
