"""Parameter groups, optimizer and learning rate."""

from typing import Any

import torch
from torch import nn

from distill.config.schema import OptimConfig, OptimizerName, Parametrization
from distill.model import Transformer
from distill.model.parametrization import scales
from losses.schedule import schedule


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


def build(model: Transformer, config: OptimConfig) -> torch.optim.Optimizer:
    """One parameter group per weight decay, learning-rate factor and eps that occurs; frozen parameters are in none."""
    groups: dict[tuple[float, float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factors = scales(model.config, name)
        decay = getattr(config.weight_decay, decay_group(name)) * factors.weight_decay
        groups.setdefault((decay, factors.lr, config.eps * factors.eps), []).append(parameter)
    grouped = [
        {"params": params, "weight_decay": decay, "lr_factor": factor, "eps": eps}
        for (decay, factor, eps), params in groups.items()
    ]
    optimizer: torch.optim.Optimizer
    if config.optimizer is OptimizerName.adamw:
        optimizer = torch.optim.AdamW(grouped, betas=(config.betas[0], config.betas[1]), fused=True)
    else:
        assert model.config.parametrization is Parametrization.standard, "checked with the configuration"
        optimizer = torch.optim.SGD(grouped, momentum=config.betas[0])
    set_learning_rate(optimizer, config.lr)
    return optimizer


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Gives every group of `build`'s optimizer, or of what wraps it, its learning rate: `lr` times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def moments(config: OptimConfig) -> tuple[str, ...]:
    """Names of the optimizer's state tensors that have their parameter's shape."""
    return ("exp_avg", "exp_avg_sq") if config.optimizer is OptimizerName.adamw else ("momentum_buffer",)


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of the update that turns `step` finished steps into step + 1, of `steps` in all."""
    kind, final = config.schedule.value, config.lr * config.final_lr
    warmup, decay = round(config.warmup * steps), max(1, round(config.decay * steps))
    return schedule(kind, step, steps, peak=config.lr, final=final, warmup=warmup, decay=decay, first=1)
