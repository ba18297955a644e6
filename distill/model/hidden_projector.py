"""A learned projection of a student's last hidden states to the width of its teacher.

It trains with the student and is in its checkpoints, but no part of the model: whoever loads weights for anything else
leaves it out.
"""

import torch
from torch import Tensor, nn

from distill.model.linear import Linear
from distill.model.parametrization import scales
from distill.model.transformer import Transformer

NAME = "hidden_projector"


def attach(model: Transformer, width: int, seed: int) -> Linear:
    """Adds the projection, weight [width, D], to a model before it trains. Its weights are drawn apart from the
    model's; its product is that of logits outside of a loss."""
    weight_ED = torch.empty(width, model.config.hidden_size)
    std = model.config.init_std * scales(model.config, f"{NAME}.weight").init
    nn.init.normal_(weight_ED, std=std, generator=torch.Generator().manual_seed(seed))
    module = Linear(model.config.hidden_size, width, model.linear)
    module.weight = nn.Parameter(weight_ED)
    model.add_module(NAME, module)
    return module


def without(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors, by name, without the projection."""
    return {key: tensor for key, tensor in tensors.items() if f"/{NAME}." not in key}
