"""What a precision is made of; the key `precision.name` names one (`PRECISIONS` in distill/config/registry.py).

In every precision master weights, moments, sums of gradients over micro-batches, router logits, norms, softmax and
losses are fp32; a precision decides what weights and activations are stored in, and how they are multiplied.
"""

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F

from distill.config.registry import PRECISIONS, loaded
from distill.config.schema import PrecisionConfig
from distill.model.linear import NATIVE, GroupedFn, LinearFn, Plain, grouped_mm, in_fp32


class Numerics(NamedTuple):
    """The dtype of a model's weights and activations, and the products that it is built with."""

    dtype: torch.dtype
    linear_fn: LinearFn
    """Of attention projections and feed-forwards."""
    grouped_fn: GroupedFn
    """Of the routed experts."""
    plain: Plain = NATIVE
    """All others."""
    row_multiple: int = 1
    """Each expert's rows are filled up to a multiple of it."""


def fp32(config: PrecisionConfig, device: torch.device) -> Numerics:
    return Numerics(torch.float32, F.linear, grouped_mm)


def bf16(config: PrecisionConfig, device: torch.device) -> Numerics:
    """On a CPU products of bf16 operands are computed in fp32 unless `precision.native` is set: processors differ a
    thousandfold in their speed in bf16 itself."""
    if device.type != "cpu" or config.native:
        return Numerics(torch.bfloat16, F.linear, grouped_mm)
    plain = Plain(in_fp32(F.linear), in_fp32(F.scaled_dot_product_attention))
    return Numerics(torch.bfloat16, plain.linear, in_fp32(grouped_mm), plain)


def auto(config: PrecisionConfig, device: torch.device) -> Numerics:
    return numerics_of(dataclasses.replace(config, name=automatic(device)), device)


def automatic(device: torch.device) -> str:
    """The precision that `auto` means on a device: bf16 on a GPU that has it, else fp32."""
    return "bf16" if device.type == "cuda" and lacking("bf16", device) is None else "fp32"


def numerics_of(config: PrecisionConfig, device: torch.device) -> Numerics:
    """What models on a device are made of."""
    entry = PRECISIONS[config.name]
    found: Numerics = entry if isinstance(entry, Numerics) else loaded(entry.numerics)(config, device)
    return found


def lacking(name: str, device: torch.device) -> str | None:
    """A sentence about a precision that a device does not have."""
    if device.type != "cuda":
        return None
    has = torch.cuda.get_device_capability(device)
    needs = {each: getattr(PRECISIONS[each], "capability", (0, 0)) for each in PRECISIONS.names}
    if has >= needs[name]:
        return None
    allowed = ", ".join(each for each, least in needs.items() if has >= least)
    return (
        f"precision.name is {name}; it needs a GPU of compute capability {needs[name][0]}.{needs[name][1]}, and "
        f"{torch.cuda.get_device_name(device)} has {has[0]}.{has[1]}; allowed there: {allowed}"
    )
