"""Penalties that a training step may add for its routers: on uneven load within a sequence, and on large logits.

Both are sums in which a token has the weight that it has in the language loss. One division by the number of valid
tokens then applies to all, however a batch is cut into micro-batches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def sequence_balance(logits_TE: Tensor, experts_TA: Tensor, sequences: int) -> Tensor:
    """Imbalance of each sequence, [B]: sum over experts of f * P, 1 where the load is even, E / A at worst.

    f is an expert's count over the even one, and carries no gradient; P its mean share of the sigmoids, which does
    (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20).

    Args:
        logits_TE: router logits of B sequences of equal length, one after another.
        experts_TA: int64, the selected experts.
    """
    experts, active = logits_TE.shape[1], experts_TA.shape[1]
    score_TE = logits_TE.float().sigmoid()
    # The floor keeps a token whose sigmoids all vanish from dividing by zero.
    share_BSE = (score_TE / score_TE.sum(1, keepdim=True).clamp(min=1e-20)).unflatten(0, (sequences, -1))
    chosen_TE = torch.zeros_like(score_TE).scatter_(1, experts_TA, experts / active)
    return (chosen_TE.unflatten(0, (sequences, -1)).mean(1) * share_BSE.mean(1)).sum(1)


def z_loss(logits_TE: Tensor) -> Tensor:
    """Squared log-sum-exp of each token's router logits, [T] (ST-MoE, arXiv 2202.08906, equation 5)."""
    return logits_TE.float().logsumexp(1).square()


def routing_loss(
    logits_LTE: Sequence[Tensor], experts_LTA: Sequence[Tensor], valid_BS: Tensor, *, balance: float, z: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Both penalties of all MoE layers, as a sum over valid tokens.

    Args:
        valid_BS: tokens that carry loss; a sequence's imbalance counts as often as it has valid tokens.
        balance, z: coefficients, per layer; a penalty of coefficient 0 is not computed.

    Returns:
        The weighted sum over layers, for the backward pass; and each penalty's plain sum as the mean over layers,
        detached, by name (`balance_loss`, `z_loss`), for the meters.
    """
    total = torch.zeros((), device=valid_BS.device)
    parts: dict[str, Tensor] = {}
    if not logits_LTE:
        return total, parts
    valid_B, valid_T = valid_BS.sum(1), valid_BS.flatten()
    if balance > 0:
        sums = [(sequence_balance(x, e, len(valid_B)) * valid_B).sum() for x, e in zip(logits_LTE, experts_LTA)]
        total = total + balance * torch.stack(sums).sum()
        parts["balance_loss"] = torch.stack(sums).mean().detach()
    if z > 0:
        sums = [(z_loss(x) * valid_T).sum() for x in logits_LTE]
        total = total + z * torch.stack(sums).sum()
        parts["z_loss"] = torch.stack(sums).mean().detach()
    return total, parts
