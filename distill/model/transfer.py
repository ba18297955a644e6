"""Tensors on their way to a device, while the host goes on.

A copy that does not hold up the host starts from pinned memory, in one piece; from any other the host waits until the
bytes are gone.
"""

import torch
from torch import Tensor


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """The same in memory from which `sent` need not copy it again; as it is, where the device is no GPU."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor
    return tensor.contiguous().pin_memory()


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The same on `device`; what follows there finds it, and the host does not wait."""
    return pinned(tensor, device).to(device, non_blocking=True)
