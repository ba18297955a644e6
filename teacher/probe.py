"""How a model of `transformers` makes logits of its last hidden states, tested on states that are planted.

Caps, scales and biases of logits have a dozen names, and small logits may not show them. So the model runs once with
planted hidden states in place of its own: zeros, and one direction scaled so that logits are small and huge. A bias
shows at zero, a scale where logits are small, a cap where they are huge, whatever their names. A cap or scale that a
configuration names and the model does not apply is an error: the teacher's targets would be those of another model.
"""

import inspect
import math
from collections.abc import Iterable, Iterator
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


class HeadForm(NamedTuple):
    """How a model makes logits of its last hidden states."""

    plain: bool
    """By the product with the unembedding, and nothing else."""
    width: int
    """V of the logits, which may be less than the unembedding's rows."""


@torch.no_grad()
def probe(model: Any, name: str) -> HeadForm:
    """Runs the model, wherever it is, on a few tokens.

    Args:
        name: of the teacher in messages.

    Raises:
        ConfigError: a line for every cap or scale of the configuration that the model does not apply.
    """
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}.values()
    named = {key: value for config in configs for key, value in _named(config)}
    sizes = [1.0, *(size for key in named if key in CAPS and (size := number(named[key])) is not None)]
    logits_PV, product_PV = _planted(model, 0.01 * min(sizes), 1e4 * max(sizes))
    refused = [key for key in named if key in WITHIN and not _applies(model, configs, key)]
    plain = False
    if product_PV is None:  # nothing was tested: what a class has is trusted
        refused += [key for key in named if key not in WITHIN and not _has(configs, key)]
    else:
        plain = product_PV.shape == logits_PV.shape and all(
            bool(b_V.isfinite().all()) and bool((a_V - b_V).abs().max() <= 1e-5 * b_V.abs().max())
            for a_V, b_V in zip(product_PV.double(), logits_PV.double())
        )
        refused += _not_applied(named, logits_PV.double(), product_PV.double())
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
    return HeadForm(plain, logits_PV.shape[-1])


def _not_applied(named: dict[str, Any], logits_PV: Tensor, product_PV: Tensor) -> list[str]:
    """The caps and scales of logits that the logits of planted states do not show."""
    zero_V, small_V, huge_V = logits_PV
    # Padded rows, which some models leave out and others set to minus infinity, are not compared.
    x_V, y_V = product_PV[1, : logits_PV.shape[-1]], small_V - zero_V
    known_V = y_V.isfinite()
    ratio = float((x_V * y_V)[known_V].sum() / (x_V * x_V)[known_V].sum().clamp(min=1e-300))
    scales = [key for key in named if key in SCALES]
    refused = [] if _is_product(ratio, [number(named[key]) for key in scales]) else scales
    largest = float(huge_V[huge_V.isfinite()].abs().max())
    caps = {key: number(value) for key, value in named.items() if key in CAPS}
    return refused + [key for key, cap in caps.items() if cap is None or largest > 1.01 * cap]


class Planted(NamedTuple):
    logits_PV: Tensor
    product_PV: Tensor | None
    """Of the planted states and the unembedding; None: no states could be planted."""


def _planted(model: Any, small: float, huge: float) -> Planted:
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
    ids_1P = torch.zeros(1, 3, dtype=torch.long, device=next(model.parameters()).device)
    try:
        logits_PV = call(model, ids_1P, torch.ones_like(ids_1P)).logits[0]
    finally:
        if hook is not None:
            hook.remove()
    return Planted(logits_PV, products[0] if products else None)


def call(module: Any, ids_NL: Tensor, mask_NL: Tensor) -> Any:
    """The output of a model, or its base, for rows padded on the right, where a causal model without a mask needs
    none."""
    takes_mask = "attention_mask" in inspect.signature(module.forward).parameters
    return module(input_ids=ids_NL, use_cache=False, **({"attention_mask": mask_NL} if takes_mask else {}))


def _named(config: Any) -> Iterator[tuple[str, Any]]:
    """Caps and scales that a configuration has and that would change something."""
    for key in (*CAPS, *SCALES, *WITHIN):
        value = getattr(config, key, None)
        if value is not None and value != (0 if "cap" in key else 1):
            yield key, value


def number(value: Any) -> float | None:
    """The value as a float; None: it is no number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _has(configs: Iterable[Any], key: str) -> bool:
    """The field belongs to the class of the configuration, not only to the file."""
    return any(hasattr(type(config), key) for config in configs)


def _applies(model: Any, configs: Iterable[Any], key: str) -> bool:
    """The field belongs to the class, and each kind of module that stores it uses it in a method but `__init__`.

    Gemma 3 stores the cap of its attention and never uses it.
    """
    keepers = {type(module) for module in model.modules() if key in vars(module)}
    return _has(configs, key) and all(any(key in names for names in _used_by(kind)) for kind in keepers)


def _used_by(kind: type) -> Iterator[tuple[str, ...]]:
    """The names that each method of a module's class uses, `__init__` excepted."""
    for parent in kind.__mro__:
        for name, method in vars(parent).items():
            code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
            if name != "__init__" and code is not None:
                yield code.co_names


def _is_product(ratio: float, scales: list[float | None]) -> bool:
    """Whether a factor on logits is the product of scales, each multiplied by or divided by; without scales: always."""
    if not all(scales):
        return False
    signs = product((1, -1), repeat=len(scales))
    products = [math.prod(scale**sign for scale, sign in zip(scales, each) if scale) for each in signs]
    return not scales or any(abs(ratio - one) <= 0.02 * abs(one) for one in products)
