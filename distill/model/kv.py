"""Keys and values that cached decoding keeps, and attention over them.

A layer without positions keeps those of every token. A layer with positions attends to a token's chunk alone, so it has
room for one chunk: a token goes to slot position % chunk, over a token of the chunk before. Positions come one after
another, so the slots up to a token's own are those of its chunk.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Slots(NamedTuple):
    """Where new tokens go in the caches of all layers of one kind, and which slots they attend to."""

    row_N: Tensor
    """int64, row of the cache."""
    slot_N: Tensor
    """int64, place in the row."""
    source_N: Tensor | None
    """int64, which of the P new keys goes there; None: all of them, in order."""
    visible_BnS: Tensor | None
    """bool, slots that each of the n new tokens of a row attends to; None: new tokens attend to each other alone, as
    planned (prefill)."""


class KV:
    """Keys, after rotation and norm, and values of one layer: [B, G, S, C] each."""

    def __init__(self, rows: int, heads: int, slots: int, channels: int, like: Tensor):
        # Not empty: slots that nothing was written to are masked, but a mask does not hide nan.
        self.keys_BGSC = like.new_zeros(rows, heads, slots, channels)
        self.values_BGSC = like.new_zeros(rows, heads, slots, channels)

    def write(self, k_PGC: Tensor, v_PGC: Tensor, slots: Slots) -> None:
        for cache_BGSC, new_PGC in ((self.keys_BGSC, k_PGC), (self.values_BGSC, v_PGC)):
            new_NGC = new_PGC if slots.source_N is None else new_PGC.index_select(0, slots.source_N)
            cache_BGSC[slots.row_N, :, slots.slot_N] = new_NGC

    def attend(self, q_PHC: Tensor, visible_BnS: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """n queries of each row, row after row, over its visible slots; [P, H * C] with P = B * n."""
        rows, new, slots = visible_BnS.shape
        q_BHnC = q_PHC.unflatten(0, (rows, new)).transpose(1, 2)
        keys_BGSC, values_BGSC = self.keys_BGSC[:, :, :slots], self.values_BGSC[:, :, :slots]
        mask_B1nS = visible_BnS.unsqueeze(1)
        y = attend(q_BHnC, keys_BGSC, values_BGSC, attn_mask=mask_B1nS, enable_gqa=True)
        return y.transpose(1, 2).flatten(2).flatten(0, 1)
