"""Soft and hard loss in one pass over the head, with two weights for every token.

    w_h CE(e_y, z) + w_s CE(p, z) = CE(m, z)          with m = w_h e_y + w_s p
                                  = M lse(z) - sum_i m_i z_i,   M = w_h + w_s sum_i p_i
    gradient with respect to z    = M softmax(z) - m

so any weighting of sparse soft targets costs what a hard label costs, with K + 1 gathered logits in place of one.
M is not assumed to be 1: the mass of a sampled row is 1 only on average.

The product with the unembedding is part of the function. Tokens go through it in chunks, and the gradients of a
chunk are formed while its logits exist, so no [T, V] tensor outlives its chunk and the weight is needed once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Tap = Callable[[int, Tensor, Tensor], None]


class MixedLoss(NamedTuple):
    """`loss_sum` carries the gradient; the parts are for meters and weighting and are detached.

    loss_sum: scalar, nats, weighted and summed over tokens; the engine divides it once.
    hard_T: cross entropy against the label, unweighted, nats.
    soft_T: cross entropy against the stored atoms, unweighted, nats; 0 without targets.
    mass_T: sum of the stored probabilities.
    agree_T: whether the most probable id of the student is that of the targets; False without targets.
    """

    loss_sum: Tensor
    hard_T: Tensor
    soft_T: Tensor
    mass_T: Tensor
    agree_T: Tensor


def mixed_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    w_hard_T: Tensor,
    ids_TK: Tensor | None = None,
    probs_TK: Tensor | None = None,
    w_soft_T: Tensor | None = None,
    *,
    chunk: int = 4096,
    tap: Tap | None = None,
) -> MixedLoss:
    """Sum over tokens of w_hard CE(label) + w_soft CE(atoms), and its unweighted parts.

    Args:
        hidden_TD: normed hidden states; the head's input.
        weight_VD: unembedding.
        labels_T: next-token ids in [0, V); an invalid token has any such id and weights 0.
        w_hard_T, w_soft_T: weights, constants for the gradient.
        ids_TK, probs_TK: stored atoms; padding has probability 0 and any id in [0, V); an id that
            occurs twice counts twice.
        chunk: tokens whose logits live at one time; the result does not depend on it beyond rounding.
        tap: called under no_grad with (first token, probabilities, their logarithms), [t, V] each, of every chunk; it
            must not write to the probabilities.

    Returns:
        MixedLoss in at least fp32. Gradients flow to hidden_TD and weight_VD.

    Source: for one weight, the merged target of sparse distillation (arXiv 2503.16870, appendix); chunking with
    gradients formed in the forward pass as in Liger-Kernel's chunked losses.
    """
    return MixedLoss(
        *_Mixed.apply(hidden_TD, weight_VD, labels_T, w_hard_T, ids_TK, probs_TK, w_soft_T, chunk, tap)  # type: ignore[no-untyped-call]
    )


class _Mixed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        w_hard_T: Tensor,
        ids_TK: Tensor | None,
        probs_TK: Tensor | None,
        w_soft_T: Tensor | None,
        chunk: int,
        tap: Tap | None,
    ) -> tuple[Tensor, ...]:
        num_tokens = hidden_TD.shape[0]
        dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden_TD = torch.empty_like(hidden_TD) if want_hidden else None
        # The sum over chunks is kept in at least fp32; one rounding to the weight's dtype comes at the end.
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=dtype) if want_weight else None
        loss_sum = hidden_TD.new_zeros((), dtype=dtype)
        hard_T = hidden_TD.new_zeros(num_tokens, dtype=dtype)
        soft_T, mass_T = torch.zeros_like(hard_T), torch.zeros_like(hard_T)
        agree_T = torch.zeros(num_tokens, dtype=torch.bool, device=hidden_TD.device)

        for start in range(0, num_tokens, chunk):
            rows = slice(start, start + chunk)
            hidden_tD = hidden_TD[rows]
            logits_tV = (hidden_tD @ weight_VD.T).to(dtype)
            lse_t = logits_tV.logsumexp(-1)
            labels_t1 = labels_T[rows, None]
            w_hard_t = w_hard_T[rows].to(dtype)
            hard_t = lse_t - logits_tV.gather(-1, labels_t1).squeeze(-1)
            loss_t = w_hard_t * hard_t
            total_t = w_hard_t
            hard_T[rows] = hard_t
            if ids_TK is not None:
                assert probs_TK is not None and w_soft_T is not None, "atoms come with probabilities and a weight"
                ids_tK, probs_tK, w_soft_t = ids_TK[rows], probs_TK[rows].to(dtype), w_soft_T[rows].to(dtype)
                mass_t = probs_tK.sum(-1)
                soft_t = mass_t * lse_t - (probs_tK * logits_tV.gather(-1, ids_tK)).sum(-1)
                loss_t = loss_t + w_soft_t * soft_t
                total_t = total_t + w_soft_t * mass_t
                soft_T[rows], mass_T[rows] = soft_t, mass_t
                best_t = ids_tK.gather(-1, probs_tK.argmax(-1, keepdim=True)).squeeze(-1)
                agree_T[rows] = (logits_tV.argmax(-1) == best_t) & (mass_t > 0)
            loss_sum += loss_t.sum()

            if grad_hidden_TD is None and grad_weight_VD is None and tap is None:
                continue
            # In place: the logits are spent, and but for a tap this chunk needs no second [t, V] tensor.
            logprobs_tV = logits_tV.sub_(lse_t[:, None])
            if tap is None:
                probs_tV = logprobs_tV.exp_()
            else:
                probs_tV = logprobs_tV.exp()
                tap(start, probs_tV, logprobs_tV)
                if grad_hidden_TD is None and grad_weight_VD is None:
                    continue
            grad_tV = probs_tV.mul_(total_t[:, None])
            grad_tV.scatter_add_(-1, labels_t1, -w_hard_t[:, None])
            if ids_TK is not None:
                grad_tV.scatter_add_(-1, ids_tK, -w_soft_t[:, None] * probs_tK)
            grad_tV = grad_tV.to(hidden_TD.dtype)
            if grad_hidden_TD is not None:
                torch.mm(grad_tV, weight_VD, out=grad_hidden_TD[rows])
            if grad_weight_VD is not None:
                grad_weight_VD += grad_tV.T @ hidden_tD

        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        ctx.save_for_backward(grad_hidden_TD, grad_weight_VD)
        ctx.mark_non_differentiable(hard_T, soft_T, mass_T, agree_T)
        return loss_sum, hard_T, soft_T, mass_T, agree_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_TD, grad_weight_VD = ctx.saved_tensors
        scaled = [None if g is None else g * grad.to(g.dtype) for g in (grad_hidden_TD, grad_weight_VD)]
        return (*scaled, *[None] * 7)
