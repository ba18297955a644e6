"""Divergences of a student's distribution q from a teacher's p, each with its derivative in closed form.

Each takes log p and log q, [t, N] over any N outcomes, neither of them infinite (`LEAST` is the logarithm of 0), and
returns the divergence of each row, nats [t], and its derivative with respect to every log q, as if each were free,
[t, N], up to a multiple of q, which no softmax lets through; `through_softmax` leads from there to logits. An outcome
that neither distribution has adds nothing.
"""

import math

import torch
from torch import Tensor

LEAST = -1e30
"""The logarithm of a probability of 0: finite, so that 0 times it is 0."""


def cross_entropy(teacher_tN: Tensor, student_tN: Tensor) -> tuple[Tensor, Tensor]:
    """-sum p log q: forward KL and the teacher's entropy."""
    p_tN = teacher_tN.exp()
    return -(p_tN * student_tN).sum(-1), p_tN.neg_()


def forward_kl(teacher_tN: Tensor, student_tN: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p, q) = sum p log(p / q); Hinton et al., arXiv 1503.02531."""
    p_tN = teacher_tN.exp()
    return (teacher_tN - student_tN).mul_(p_tN).sum(-1), p_tN.neg_()


def reverse_kl(teacher_tN: Tensor, student_tN: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q, p); MiniLLM, arXiv 2306.08543. It needs p > 0 wherever q is."""
    terms_tN = (student_tN - teacher_tN).mul_(student_tN.exp())
    return terms_tN.sum(-1), terms_tN


def jensen_shannon(teacher_tN: Tensor, student_tN: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """beta KL(p, m) + (1 - beta) KL(q, m) with m = beta p + (1 - beta) q; GKD, arXiv 2306.13649."""
    mean_tN = torch.logaddexp(teacher_tN + math.log(beta), student_tN + math.log1p(-beta))
    from_p_t = (teacher_tN - mean_tN).mul_(teacher_tN.exp()).sum(-1)
    from_q_tN = torch.sub(student_tN, mean_tN, out=mean_tN).mul_(student_tN.exp())
    return beta * from_p_t + (1 - beta) * from_q_tN.sum(-1), from_q_tN.mul_(1 - beta)


def skew_kl(teacher_tN: Tensor, student_tN: Tensor, skew: float) -> tuple[Tensor, Tensor]:
    """KL(p, skew p + (1 - skew) q); DistiLLM, arXiv 2402.03898."""
    own_tN = student_tN + math.log1p(-skew)
    mean_tN = torch.logaddexp(teacher_tN + math.log(skew), own_tN)
    loss_t = (teacher_tN - mean_tN).mul_(teacher_tN.exp()).sum(-1)
    return loss_t, own_tN.add_(teacher_tN).sub_(mean_tN).exp_().neg_()


def skew_reverse_kl(teacher_tN: Tensor, student_tN: Tensor, skew: float) -> tuple[Tensor, Tensor]:
    """KL(q, (1 - skew) p + skew q); DistiLLM, arXiv 2402.03898."""
    theirs_tN = teacher_tN + math.log1p(-skew)
    mean_tN = torch.logaddexp(theirs_tN, student_tN + math.log(skew))
    terms_tN = (student_tN - mean_tN).mul_(student_tN.exp())
    return terms_tN.sum(-1), terms_tN.add_(theirs_tN.add_(student_tN).sub_(mean_tN).exp_())


def alpha_beta(teacher_tN: Tensor, student_tN: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """-1 / (alpha beta) sum [p^alpha q^beta - alpha/s p^s - beta/s q^s] with s = alpha + beta.

    Alpha and beta are at least 0 and not both 0; where one is 0 this is the limit, so (1, 0) is forward and (0, 1)
    reverse KL, and alpha = 0 needs p > 0 wherever q is. Cichocki et al., Entropy 13 (2011) 134; ABKD, arXiv 2505.04560.
    """
    both = alpha + beta
    p_tN, q_tN = (both * teacher_tN).exp_(), (both * student_tN).exp_()
    if alpha == 0:
        terms_tN = (student_tN - teacher_tN).mul_(q_tN)
        return (terms_tN / beta - (q_tN - p_tN) / beta**2).sum(-1), terms_tN
    if beta == 0:
        terms_tN = (teacher_tN - student_tN).mul_(p_tN)
        return (terms_tN / alpha - (p_tN - q_tN) / alpha**2).sum(-1), q_tN.sub_(p_tN).div_(alpha)
    product_tN = (alpha * teacher_tN).add_(student_tN, alpha=beta).exp_()
    loss_t = (p_tN.mul_(alpha / both).add_(q_tN, alpha=beta / both).sub_(product_tN)).sum(-1) / (alpha * beta)
    return loss_t, q_tN.sub_(product_tN).div_(alpha)


def through_softmax(grad_tN: Tensor, q_tN: Tensor) -> Tensor:
    """Derivative with respect to the logits of q, of what has this derivative with respect to every log q; in place."""
    return grad_tN.addcmul_(q_tN, grad_tN.sum(-1, keepdim=True), value=-1.0)
