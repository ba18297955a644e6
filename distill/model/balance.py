"""Load balancing without an auxiliary loss: a bias per expert that follows the load (arXiv 2408.15664)."""

import math

import torch
from torch import Tensor

from distill.config.model import moe_layers
from distill.model.transformer import Transformer


@torch.no_grad()
def update_bias(model: Transformer, counts_LE: Tensor, rate: float) -> None:
    """Moves each router's bias one step against its load: delta = rate * sign(mean(c) - c), less delta's mean.

    Args:
        counts_LE: tokens per expert of each MoE layer over the whole optimizer step and all ranks.
        rate: step in units of sigmoid(logit).
    """
    for router, counts_E in zip(model.routers, counts_LE, strict=True):
        load_E = counts_E.float()
        delta_E = rate * torch.sign(load_E.mean() - load_E)
        router.bias += delta_E - delta_E.mean()


def degenerate_routers(model: Transformer) -> list[int]:
    """Layers whose router gives all experts one logit: all rows of its weight are equal, and so is all of its bias.

    Every token then goes to the same experts. Training does not show it, since the loss still falls (see the derivation
    that accompanies arXiv 2601.20205).
    """
    degenerate = []
    for layer, router in zip(moe_layers(model.config), model.routers, strict=True):
        selects = router.active < len(router.weight)
        if selects and bool((router.weight == router.weight[0]).all() and (router.bias == router.bias[0]).all()):
            degenerate.append(layer)
    return degenerate


def load_stats(counts_LE: Tensor) -> dict[str, Tensor]:
    """How even the experts' load is; fp32 scalars on the device of the counts, none for a model without MoE layers.

    Returns:
        `expert_entropy`: entropy of the load over log E, mean over layers (1: even). `expert_max_load`: largest load
        of an expert over its layer's mean, worst layer. `dead_experts`: experts without a token, over all layers.
    """
    layers, experts = counts_LE.shape
    if not layers:
        return {}
    share_LE = counts_LE.float() / counts_LE.sum(1, keepdim=True).clamp(min=1)
    entropy_L = -torch.xlogy(share_LE, share_LE).sum(1) / math.log(max(experts, 2))
    return {
        "expert_entropy": entropy_L.mean(),
        "expert_max_load": share_LE.max() * experts,
        "dead_experts": (counts_LE == 0).sum().float(),
    }
