"""Loss by position within the document, in bins that widen with the position."""

from typing import NamedTuple

import torch
from torch import Tensor

from distill.model.segments import document_starts
from distill.model.transfer import sent

STARTS = [0, *sorted({round(2 ** (step / 4)) for step in range(4 * 26)})]
"""First position of each bin: four for each doubling; powers of two begin one, as they begin a chunk."""


class Bin(NamedTuple):
    """Positions first to last, each counting the tokens before it in its document; loss in nats per token."""

    first: int
    last: int
    loss: float
    tokens: int


def positions(documents_BS: Tensor) -> Tensor:
    """Tokens before each token in its document, as far as the sample holds it; int64 [B, S].

    Args:
        documents_BS: ordinal of each token's document, non-decreasing along a row.
    """
    at_S = torch.arange(documents_BS.shape[1], device=documents_BS.device)
    return at_S - torch.where(document_starts(documents_BS), at_S, 0).cummax(1).values


def add(sums_2N: Tensor, loss_T: Tensor, valid_T: Tensor, documents_BS: Tensor) -> None:
    """Adds each valid token's loss, and 1, to its position's bin; sums_2N: fp64 [2, bins]."""
    position_T = sent(positions(documents_BS).flatten(), sums_2N.device)
    starts_N = sent(torch.tensor(STARTS), sums_2N.device)
    bin_T = torch.bucketize(position_T, starts_N, right=True) - 1
    weight_T = valid_T.to(sums_2N.dtype)
    sums_2N.index_add_(1, bin_T, torch.stack([loss_T.to(sums_2N.dtype) * weight_T, weight_T]))


def bins(sums_2N: Tensor) -> list[Bin]:
    """What `add` summed, without empty bins."""
    loss_N, tokens_N = sums_2N.tolist()
    ends = [*STARTS[1:], STARTS[-1] + 1]
    rows = zip(STARTS, ends, loss_N, tokens_N)
    return [Bin(first, end - 1, loss / tokens, int(tokens)) for first, end, loss, tokens in rows if tokens]
