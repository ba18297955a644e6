"""Parameter groups, optimizer and learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from distill.config.schema import OptimConfig, OptimizerName, Schedule


def decay_group(name: str) -> str:
    """The `weight_decay` key that a parameter of the Transformer falls under."""
    vectors = ("norm.weight", ".bias", ".class_embedding", ".positional_embedding_vlm")
    if name.endswith(vectors) or "layernorm" in name:
        return "norms"
    if "router" in name:
        return "router"
    if name.endswith("embed.weight"):
        return "embedding"
    if "lm_head" in name or name.startswith("head."):
        return "head"
    return "matrices"


def build(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """One parameter group per weight decay that occurs; frozen parameters are in none."""
    by_decay: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            by_decay.setdefault(getattr(config.weight_decay, decay_group(name)), []).append(parameter)
    groups = [{"params": params, "weight_decay": decay} for decay, params in by_decay.items()]
    if config.optimizer is OptimizerName.adamw:
        betas = (config.betas[0], config.betas[1])
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
    assert config.optimizer is OptimizerName.sgd
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.betas[0])


def moments(config: OptimConfig) -> tuple[str, ...]:
    """Names of the optimizer's state tensors that have their parameter's shape."""
    return ("exp_avg", "exp_avg_sq") if config.optimizer is OptimizerName.adamw else ("momentum_buffer",)


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of the update that turns `step` finished steps into step + 1, of `steps` in all.

    Rises linearly over the warm-up share, then: constant; linear or cosine to final_lr of the peak; or (wsd) holds and
    falls linearly to it over the last `decay` share.
    """
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule is Schedule.constant:
        return config.lr
    final = config.lr * config.final_lr
    if config.schedule is Schedule.wsd:
        falling = max(1, round(config.decay * steps))
        left = min(1.0, (steps - step) / falling)
        return final + (config.lr - final) * left
    progress = (step - warmup) / max(1, steps - warmup)
    left = 1.0 - progress if config.schedule is Schedule.linear else 0.5 * (1.0 + math.cos(math.pi * progress))
    return final + (config.lr - final) * left
