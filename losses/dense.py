"""Divergences from the whole distribution of a live teacher, whose logits are made in chunks beside the student's."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.bucketed import Divergence
from losses.divergences import LEAST, through_softmax
from losses.head import Chunk
from losses.mixed import Weigh, both_weights, hard_norm
from losses.products import Products
from losses.rows import silence, weighted


class Dense(NamedTuple):
    """Row function of w_hard CE(label) + w_soft temperature^2 D(p, q) with p = softmax(teacher / temperature),
    q = softmax(student / temperature).

    The square of the temperature keeps the size of the gradient (Hinton et al., arXiv 1503.02531). The parts are those
    of `losses.mixed.Mixed`; `soft` is temperature^2 D, `mass` 1. The teacher gets no gradient.
    """

    labels_T: Tensor
    """Next-token ids in [0, V); an invalid token has any such id and weights 0."""
    weigh: Weigh
    hidden_TE: Tensor
    """The teacher's normed hidden states."""
    weight_UE: Tensor
    """Its unembedding, U <= V; ids from U on have no probability."""
    divergence: Divergence
    temperature: float = 1.0
    norms: bool = False
    """As of `losses.mixed.Mixed`."""

    @property
    def tensors(self) -> int:
        """[t, V] tensors that live at one time: both models' logits, the divergence's and its derivative's."""
        return 5

    def __call__(self, logits_tV: Tensor, rows: slice, want_grad: torch.dtype | None) -> Chunk:
        teacher_tV = Products(self.hidden_TE, self.weight_UE).logits(rows).to(logits_tV.dtype)
        agreement_t = logits_tV.argmax(-1) == teacher_tV.argmax(-1)
        if teacher_tV.shape[1] < logits_tV.shape[1]:
            teacher_tV = F.pad(teacher_tV, (0, logits_tV.shape[1] - teacher_tV.shape[1]), value=-float("inf"))
        teacher_tV.div_(self.temperature)
        teacher_tV.sub_(teacher_tV.logsumexp(-1, keepdim=True)).clamp_(min=LEAST)

        labels_t1 = self.labels_T[rows, None]
        student_tV = logits_tV / self.temperature if self.temperature != 1 else None
        logits_tV.sub_(logits_tV.logsumexp(-1, keepdim=True))
        hard_t = -logits_tV.gather(-1, labels_t1).squeeze(-1)
        if student_tV is None:
            student_tV = logits_tV
        else:
            student_tV.sub_(student_tV.logsumexp(-1, keepdim=True))
        student_tV.clamp_(min=LEAST)
        loss_t, soft_grad_tV = self.divergence(teacher_tV, student_tV)
        soft_t = self.temperature**2 * loss_t
        parts = {"hard": hard_t, "soft": soft_t, "mass": teacher_tV.new_ones(len(hard_t)), "agreement": agreement_t}
        w_hard_t, w_soft_t = both_weights(self.weigh, rows, hard_t, soft_t)
        loss_t = weighted(w_hard_t, hard_t) + weighted(w_soft_t, soft_t)
        if want_grad is None:
            return Chunk(loss_t, parts, None)

        probs_tV = logits_tV.exp_()
        soft_grad_tV = through_softmax(soft_grad_tV, probs_tV if student_tV is logits_tV else student_tV.exp_())
        if self.norms:
            parts["hard_norm"] = hard_norm(probs_tV.square().sum(-1), hard_t)
            parts["soft_norm"] = self.temperature * soft_grad_tV.norm(dim=-1)
        soft_grad_tV.mul_(self.temperature * w_soft_t[:, None])
        grad_tV = probs_tV.mul_(w_hard_t[:, None]).add_(silence(soft_grad_tV, w_soft_t != 0))
        grad_tV.scatter_add_(-1, labels_t1, -w_hard_t[:, None])
        return Chunk(loss_t, parts, silence(grad_tV, (w_hard_t != 0) | (w_soft_t != 0)))
