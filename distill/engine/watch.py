"""The first step at which something was not finite: kept on the device, and read where it counts."""

import torch
from torch import Tensor

from distill.engine.dist import Dist

KINDS = ("loss", "gradient norm", "weights")
_NEVER = torch.iinfo(torch.int64).max


class Watch:
    """Finiteness of one model in training. `note` waits for nothing; `good` and `problem` wait for the device."""

    def __init__(self, dist: Dist):
        self._dist = dist
        self._first_N = torch.full((len(KINDS),), _NEVER, device=dist.device)

    def note(self, step: int, loss: Tensor, norm: Tensor, weights: Tensor) -> None:
        """Records whether the loss and the gradient norm of a step, and the weights after it, are finite.

        Args:
            step: as rows of metrics count: 1 for the first.
            loss, norm, weights: bool, scalar, on the device (DeepSpeed's norm may lie on the host).
        """
        device = self._first_N.device
        finite_N = torch.stack([part.to(device, non_blocking=True) for part in (loss, norm, weights)])
        self._first_N = torch.where(finite_N, self._first_N, self._first_N.clamp(max=step))

    @property
    def good(self) -> bool:
        """All that was noted on this rank was finite."""
        return bool((self._first_N == _NEVER).all())

    def problem(self) -> str | None:
        """What was not finite first, on any rank, and at which step; None: all was. Collective."""
        first_N = self._dist.least(self._first_N.clone()).tolist()
        step = min(first_N)
        if step == _NEVER:
            return None
        kinds = [kind for kind, first in zip(KINDS, first_N) if first == step]
        verb = "is" if len(kinds) == 1 and kinds != ["weights"] else "are"
        return f"{', '.join(kinds[:-1])}{' and ' * (len(kinds) > 1)}{kinds[-1]} {verb} not finite at step {step}"
