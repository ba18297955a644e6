"""Weighted means and histograms that stay on the device until they are flushed."""

from collections.abc import Callable

import torch
from torch import Tensor


class Meters:
    """Sums per name, in float64 on one device; nothing waits for the device until `flush`.

    device: of the sums; None takes the device of the first tensor. All ranks must add the same names (with weight 0
    where a rank has no items), since `flush` adds by position, not by name.
    """

    def __init__(self, device: torch.device | str | None = None):
        self.device = torch.device(device) if device is not None else None
        self._means: dict[str, Tensor] = {}
        self._histograms: dict[str, Tensor] = {}

    def add(self, name: str, sum: Tensor | float, weight: Tensor | float) -> None:
        """Add the sum (scalar) of a quantity over `weight` (scalar) items; `flush` divides all sums by all weights."""
        slot = self._slot(self._means, name, sum, 2)
        slot[0] += sum.detach() if isinstance(sum, Tensor) else sum
        slot[1] += weight.detach() if isinstance(weight, Tensor) else weight

    def histogram(self, name: str, counts: Tensor) -> None:
        """Add counts [bins] to those of the same name; the number of bins of a name never changes."""
        slot = self._slot(self._histograms, name, counts, counts.numel())
        assert slot.shape == counts.shape, f"{name}: {counts.shape} counts, {slot.shape} before"
        slot += counts.detach()

    def flush(
        self, reduce: Callable[[Tensor], object] | None = None
    ) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Weighted means and counts [bins] since the last flush, by name; starts again from zero.

        reduce: adds up one flat float64 tensor in place over the ranks; called once, with all sums in it. One
        transfer to the host. Names whose total weight is 0 are left out.
        """
        means, histograms = dict(sorted(self._means.items())), dict(sorted(self._histograms.items()))
        self._means, self._histograms = {}, {}
        slots = [*means.values(), *histograms.values()]
        if not slots:
            return {}, {}
        flat = torch.cat(slots)
        if reduce is not None:
            reduce(flat)
        values = iter(flat.tolist())
        pairs = {name: (next(values), next(values)) for name in means}
        counts = {name: [next(values) for _ in range(len(slot))] for name, slot in histograms.items()}
        return {name: total / weight for name, (total, weight) in pairs.items() if weight != 0}, counts

    def state(self) -> dict[str, Tensor]:
        """The sums since the last flush, by name; for `load_state` in a later process."""
        means = {f"mean/{name}": slot for name, slot in self._means.items()}
        return means | {f"histogram/{name}": slot for name, slot in self._histograms.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Adds sums to those that are here."""
        for key, sums in state.items():
            kind, name = key.split("/", 1)
            slots = self._means if kind == "mean" else self._histograms
            slot = self._slot(slots, name, sums, sums.numel())
            slot += sums.to(slot.device)

    def _slot(self, slots: dict[str, Tensor], name: str, like: Tensor | float, size: int) -> Tensor:
        if name not in slots:
            if self.device is None and isinstance(like, Tensor):
                self.device = like.device
            slots[name] = torch.zeros(size, dtype=torch.float64, device=self.device)
        return slots[name]
