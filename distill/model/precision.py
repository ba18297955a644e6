"""What a precision is made of; the key `precision` names one (`PRECISIONS` in distill/config/registry.py)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from distill.model.linear import GroupedFn, LinearFn, grouped_mm


class Numerics(NamedTuple):
    """The dtype of a model's weights and activations, and the matrix products that it is built with."""

    dtype: torch.dtype
    linear_fn: LinearFn
    grouped_fn: GroupedFn


FP32 = Numerics(torch.float32, F.linear, grouped_mm)
BF16 = Numerics(torch.bfloat16, F.linear, grouped_mm)
