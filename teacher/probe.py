"""What a model of `transformers` makes of its last hidden states, tried on states that are planted.

Caps, scales and biases of logits go by a dozen names, and none need show on a batch of small logits. So the model runs
once with hidden states of ours in place of its own: zeros, and one direction scaled so that logits come out small and
huge. A bias shows at zero, a scale where they are small, a cap where they are huge, whatever their names. And what a
configuration names but the model does not do is found: such a teacher's targets would be those of another model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.config.errors import ConfigError

CAPS = (
    "final_logit_softcapping", "final_logit_softcap", "final_logits_softcapping", "logit_softcapping", "logit_soft_cap",
    "logits_soft_cap", "logits_softcap", "output_logit_soft_cap",
)  # fmt: skip
"""Names for the largest size of a logit."""
SCALES = (
    "logit_scale", "logits_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier",
    "output_multiplier_scale", "logits_mup_width_multiplier", "mup_width_multiplier",
)  # fmt: skip
"""Names for a factor on logits, by which some models multiply and others divide."""
WITHIN = (
    "attn_logit_softcapping", "attention_logit_cap", "attention_multiplier", "residual_multiplier",
    "embedding_multiplier", "scale_emb", "scale_depth", "dim_model_base",
)  # fmt: skip
"""Names for caps and factors before the last hidden states, which only a class that has them applies."""


class Head(NamedTuple):
    plain: bool
    """Logits are the product of hidden states and unembedding, and nothing else."""
    width: int
    """V of the logits, which may be less than the unembedding's rows."""


@torch.no_grad()
def probe(model: Any, name: str) -> Head:
    """Runs the model, wherever it is, on a few tokens.

    Args:
        name: what messages call it.

    Raises:
        ConfigError: a line for every cap or scale of the configuration that the model does not apply.
    """
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}
    named = {key: value for config in configs.values() for key, value in _named(config)}
    sizes = [1.0, *(float(value) for key, value in named.items() if key in CAPS and _is_number(value))]
    found = _planted(model, 0.01 * min(sizes), 1e4 * max(sizes))
    refused = [key for key in named if key in WITHIN and not _applies(model, configs.values(), key)]
    plain = False
    if found.product_PV is None:  # nothing was tried: what a class has is trusted
        refused += [key for key in named if key not in WITHIN and not _has(configs.values(), key)]
    else:
        zero_V, small_V, huge_V = found.logits_PV.double()
        product_PV = found.product_PV.double()
        plain = product_PV.shape == found.logits_PV.shape and all(
            bool(b_V.isfinite().all()) and bool((a_V - b_V).abs().max() <= 1e-5 * b_V.abs().max())
            for a_V, b_V in zip(product_PV, (zero_V, small_V, huge_V))
        )
        # Padded rows that a model leaves out, or sets to minus infinity, say nothing.
        x_V, y_V = product_PV[1, : found.width], small_V - zero_V
        known_V = y_V.isfinite()
        ratio = float((x_V * y_V)[known_V].sum() / (x_V * x_V)[known_V].sum().clamp(min=1e-300))
        scales = [key for key in named if key in SCALES]
        if not _is_product(ratio, [named[key] for key in scales]):
            refused += scales
        largest = float(huge_V[huge_V.isfinite()].abs().max())
        caps = {key: value for key, value in named.items() if key in CAPS}
        refused += [key for key, value in caps.items() if not (_is_number(value) and largest <= 1.01 * value)]
    if refused:
        kind, known = model.config.model_type, type(model).__name__
        raise ConfigError(
            *(
                f"{name}; its config.json (model_type {kind}) has {key} {named[key]!r}, which {known} of transformers "
                "does not apply: its logits are not those that it was trained with. Give it a model_type that applies "
                f"it, or take {key} out if it means nothing"
                for key in refused
            )
        )
    return Head(plain, found.width)


class _Found(NamedTuple):
    logits_PV: Tensor
    product_PV: Tensor | None
    """Of the planted states and the unembedding; None: they could not be planted."""

    @property
    def width(self) -> int:
        return self.logits_PV.shape[-1]


def _planted(model: Any, small: float, huge: float) -> _Found:
    """Logits for hidden states whose products are zeros, up to `small`, and up to `huge` in size."""
    head = model.get_output_embeddings()
    products: list[Tensor] = []

    def plant(module: Any, args: Any, out: Any) -> Any:
        hidden_1PD = out[0]
        weight_VD = head.weight
        if products or not weight_VD.is_floating_point() or hidden_1PD.shape != (1, 3, weight_VD.shape[-1]):
            return out
        generator = torch.Generator().manual_seed(0)
        direction_D = torch.randn(weight_VD.shape[-1], generator=generator, dtype=torch.float64)
        most = F.linear(direction_D.to(weight_VD), weight_VD).abs().max().double().cpu().clamp(min=1e-30)
        sizes_P1 = torch.tensor([[0.0], [small], [huge]], dtype=torch.float64)
        planted_1PD = (direction_D * (sizes_P1 / most)).to(hidden_1PD)[None]
        products.append(F.linear(planted_1PD[0].to(weight_VD.dtype), weight_VD))
        if isinstance(out, tuple):
            return (planted_1PD, *out[1:])
        out.last_hidden_state = planted_1PD
        return out

    base = model.base_model
    hook = base.register_forward_hook(plant) if head is not None and base is not model else None
    device = next(model.parameters()).device
    inputs = {"input_ids": torch.zeros(1, 3, dtype=torch.long, device=device)}
    if "attention_mask" in inspect.signature(model.forward).parameters:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    try:
        logits_PV = model(**inputs, use_cache=False).logits[0]
    finally:
        if hook is not None:
            hook.remove()
    return _Found(logits_PV, products[0] if products else None)


def _named(config: Any) -> Iterator[tuple[str, Any]]:
    """Caps and scales that a configuration has and that would change something."""
    for key in (*CAPS, *SCALES, *WITHIN):
        value = getattr(config, key, None)
        if value is not None and value != (0 if "cap" in key else 1):
            yield key, value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _has(configs: Any, key: str) -> bool:
    """The field belongs to the class of the configuration, not only to the file."""
    return any(hasattr(type(config), key) for config in configs)


def _applies(model: Any, configs: Any, key: str) -> bool:
    """The field belongs to the class; and a part of the model that keeps it does not only keep it (as Gemma 3 does with
    the cap of its attention)."""
    keepers = {type(module) for module in model.modules() if key in vars(module)}
    return _has(configs, key) and all(any(key in names for names in _used_by(kind)) for kind in keepers)


def _used_by(kind: type) -> Iterator[tuple[str, ...]]:
    """The names that each method of a module's class uses, but the one that sets it up."""
    for parent in kind.__mro__:
        for name, method in vars(parent).items():
            code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
            if name != "__init__" and code is not None:
                yield code.co_names


def _is_product(ratio: float, scales: list[Any]) -> bool:
    """Whether a factor on logits is what these make together, each multiplied by or divided by."""
    if not all(_is_number(value) and value != 0 for value in scales):
        return False
    for signs in product((1, -1), repeat=len(scales)):
        wanted = 1.0
        for value, sign in zip(scales, signs):
            wanted *= float(value) ** sign
        if abs(ratio - wanted) <= 0.02 * abs(wanted):
            return True
    return not scales
