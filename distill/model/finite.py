"""Whether a tensor holds nothing but numbers."""

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """No element is NaN or infinite. Waits for the device; takes no memory of the tensor's size."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:  # no arithmetic in FP8
        tensor = tensor.float()
    return bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())
