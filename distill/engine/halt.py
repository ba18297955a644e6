"""Signals to any rank, reported to all ranks at the same step."""

import signal
from collections.abc import Callable

import torch
from torch import Tensor

from distill.config import stop
from distill.engine.dist import Dist
from distill.model.transfer import sent

_ORDER = (signal.SIGINT, signal.SIGTERM)


class Halt:
    """Whether this step is the last: each rank's signals are added to a sum over ranks that every step makes.

    On a GPU the sum of the step before is read, which is on the host by then, so that nothing waits for the device.
    """

    def __init__(self, dist: Dist):
        self.dist = dist
        self._earlier: Callable[[], list[int]] | None = None
        self._latest: Callable[[], list[int]] | None = None

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks of an integer scalar; collective."""
        if self.dist.world == 1:
            return sent(value, self.dist.device)
        votes = [stop.asked() is number for number in _ORDER]
        summed_3 = self.dist.sum(sent(torch.stack([value, *torch.tensor(votes).to(value)]), self.dist.device))
        self._earlier, self._latest = self._latest, _on_host(summed_3[1:])
        return summed_3[0]

    def asked(self) -> signal.Signals | None:
        """After a step: the signal that any rank had got; the same on all."""
        if self.dist.world == 1:
            return stop.asked()
        get = self._earlier if self.dist.device.type == "cuda" else self._latest
        votes = [0, 0] if get is None else get()
        return next((number for number, vote in zip(_ORDER, votes) if vote), None)


def _on_host(tensor: Tensor) -> Callable[[], list[int]]:
    """Starts to copy a tensor to the host; the function waits for no more than that."""
    if tensor.device.type != "cuda":
        return tensor.tolist
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def get() -> list[int]:
        event.synchronize()
        return host.tolist()

    return get
