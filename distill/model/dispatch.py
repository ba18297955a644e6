"""The way of a MoE layer's rows to the experts and back, for experts that lie in one process.

A dispatcher is handed to the model when it is built; the key `engine.dispatcher` names one (`DISPATCHERS` in
distill/config/registry.py). An expert-parallel one holds some of the experts (`held`) and extends the local one:
it exchanges the sorted rows between processes after `dispatch` and before `combine`.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Dispatched(NamedTuple):
    """T tokens of this process on their way through the experts; R rows for the experts that it holds."""

    x_RD: Tensor
    """Input of the held experts: rows sorted by expert, each scaled by its weight; zeros fill up each expert's."""
    ends_E: Tensor
    """int32, where each held expert's rows end; the last at R."""
    counts_E: Tensor
    """int64, how many of this process's T * A rows go to each expert of the layer, held or not."""
    state: Any
    """Input of `combine`."""


class LocalDispatcher:
    """Takes tokens to their experts and the results back. Holds no state of a layer: all layers share one."""

    row_multiple: int = 1
    """Each held expert's rows are filled up to a multiple of it; the run's precision sets it."""

    def held(self, experts: int) -> range:
        """Which of a layer's E experts have their parameters in this process."""
        return range(experts)

    def dispatch(self, hidden_TD: Tensor, experts_TA: Tensor, weight_TA: Tensor, experts: int) -> Dispatched:
        """The rows weight * hidden of each token's experts.

        Args:
            experts_TA: int64, which of the layer's experts each token goes to.
            weight_TA: factor of the expert's input.
            experts: E.
        """
        # Stable: tokens of an expert keep their order, so the bits depend on nothing but the input.
        expert_R, source_R = experts_TA.flatten().sort(stable=True)
        every_E = torch.arange(experts, device=hidden_TD.device)
        ends_E = torch.searchsorted(expert_R, every_E, right=True, out_int32=True)
        counts_E = ends_E.long().diff(prepend=every_E.new_zeros(1))
        scaled_RD = (hidden_TD.unsqueeze(1) * weight_TA.unsqueeze(-1)).flatten(0, 1)
        row_TA = source_R.argsort().view_as(experts_TA)
        if self.row_multiple == 1:
            return Dispatched(scaled_RD.index_select(0, source_R), ends_E, counts_E, row_TA)
        filled_E, later_E, rows = filled(ends_E, len(source_R), self.row_multiple)
        row_TA = row_TA + later_E[experts_TA]
        x_RD = scaled_RD.new_zeros(rows, scaled_RD.shape[1]).index_copy_(0, row_TA.flatten(), scaled_RD)
        return Dispatched(x_RD, filled_E, counts_E, row_TA)

    def combine(self, y_RD: Tensor, state: Any) -> Tensor:
        """The sum over each token's experts, [T, D], of the experts' output, in the order of the dispatched rows."""
        y_TAD = y_RD.index_select(0, state.flatten()).unflatten(0, state.shape)
        return y_TAD.squeeze(1) if y_TAD.shape[1] == 1 else y_TAD.sum(1)


def filled(ends_E: Tensor, rows: int, multiple: int) -> tuple[Tensor, Tensor, int]:
    """Groups of rows filled up to multiples, in as many rows as any division into groups could need.

    So nothing waits for the device to read sizes; what is left over belongs to the last group.

    Args:
        ends_E: where the groups end, in `rows` rows.

    Returns:
        Where they end then (int32), how many rows later each starts (int32), and the rows in all.
    """
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    filled_E = ((counts_E + multiple - 1) // multiple * multiple).cumsum(0, dtype=ends_E.dtype)
    later_E = F.pad((filled_E - ends_E)[:-1], (1, 0))
    most = (rows + len(ends_E) * (multiple - 1)) // multiple * multiple
    filled_E[-1:].fill_(most)
    return filled_E, later_E, most
