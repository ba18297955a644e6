"""Weighted means and histograms that stay on the device until they are flushed."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor


class Meters:
    """Sums per name, in float64 on one device; nothing waits for the device until `flush`.

    device: of the sums. All ranks must add the same names (with weight 0 where a rank has no items), since `flush`
    adds by position, not by name.
    """

    def __init__(self, device: torch.device | str):
        self.device = device
        self._sums: dict[str, Tensor] = {}
        """By `mean/<name>`, sum and weight; by `histogram/<name>`, counts [bins]."""

    def add(self, name: str, sum: Tensor | float, weight: Tensor | float) -> None:
        """Add the sum (scalar) of a quantity over `weight` (scalar) items; `flush` divides all sums by all weights."""
        slot = self._slot(f"mean/{name}", 2)
        slot[0] += sum.detach() if isinstance(sum, Tensor) else sum
        slot[1] += weight.detach() if isinstance(weight, Tensor) else weight

    def histogram(self, name: str, counts: Tensor) -> None:
        """Add counts [bins] to those of the same name; the number of bins of a name never changes."""
        slot = self._slot(f"histogram/{name}", counts.numel())
        assert slot.shape == counts.shape, f"{name}: {counts.shape} counts, {slot.shape} before"
        slot += counts.detach()

    def flush(
        self, reduce: Callable[[Tensor], object] | None = None
    ) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Weighted means and counts [bins] since the last flush, by name; starts again from zero.

        reduce: adds up one flat float64 tensor in place over the ranks; called once, with all sums in it. One
        transfer to the host. Names whose total weight is 0 are left out.
        """
        sums, self._sums = dict(sorted(self._sums.items())), {}
        means: dict[str, float] = {}
        histograms: dict[str, list[float]] = {}
        if not sums:
            return means, histograms
        flat = torch.cat(list(sums.values()))
        if reduce is not None:
            reduce(flat)
        values = iter(flat.tolist())
        for key, slot in sums.items():
            kind, name = key.split("/", 1)
            numbers = list(itertools.islice(values, len(slot)))
            if kind == "histogram":
                histograms[name] = numbers
            elif numbers[1] != 0:
                means[name] = numbers[0] / numbers[1]
        return means, histograms

    def state(self) -> dict[str, Tensor]:
        """The sums since the last flush, for `load_state` in a later process."""
        return dict(self._sums)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Adds sums to those that are here."""
        for key, sums in state.items():
            slot = self._slot(key, sums.numel())
            slot += sums.to(slot.device)

    def _slot(self, key: str, size: int) -> Tensor:
        if key not in self._sums:
            self._sums[key] = torch.zeros(size, dtype=torch.float64, device=self.device)
        return self._sums[key]
