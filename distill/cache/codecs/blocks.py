"""Finding ids by cumulative probability without a cumulative sum over the vocabulary.

Probabilities are summed in blocks; the running sum (fp64, so that no small probability is lost in a large sum) goes
over blocks only, and a block is looked into only where a draw falls. That is one cheap pass over T x V.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDTH = 32


def probabilities(logits_TV: Tensor, lse_T: Tensor) -> Tensor:
    """exp(logits - lse) as a new float32 [T, V], V padded with zeros to whole blocks."""
    vocab = logits_TV.shape[1]
    padded = -(-vocab // WIDTH) * WIDTH
    if padded == vocab:
        return torch.sub(logits_TV.float(), lse_T.float()[:, None]).exp_()
    p_TV = logits_TV.new_zeros(len(logits_TV), padded, dtype=torch.float32)
    torch.sub(logits_TV.float(), lse_T.float()[:, None], out=p_TV[:, :vocab])
    p_TV[:, :vocab].exp_()
    return p_TV


def cumulate(p_TV: Tensor) -> Tensor:
    """Running mass float64 [T, blocks], each block included; NaN (a broken teacher) counts as no mass."""
    return p_TV.unflatten(1, (p_TV.shape[1] // WIDTH, WIDTH)).sum(-1).double().nan_to_num_(0.0).cumsum(-1)


def at_least(p_TV: Tensor, low: float) -> Tensor:
    """Flat indices into [T, V], ascending, of every probability >= low."""
    blocks = p_TV.view(-1, WIDTH)
    some = (blocks.amax(-1) >= low).nonzero().squeeze(1)
    row, column = (blocks[some] >= low).nonzero(as_tuple=True)
    return some[row] * WIDTH + column


def locate(p_TV: Tensor, block: Tensor, within: Tensor) -> Tensor:
    """Flat indices into [T, V] of the ids at cumulative mass `within` of the flat blocks `block`.

    Never an id without mass, as long as the block has some.
    """
    inner = p_TV.view(-1, WIDTH)[block].double().cumsum_(-1)
    # The two sums of a block differ in their last bits; a draw beyond the second one belongs to its last id.
    within = torch.minimum(within, torch.nextafter(inner[:, -1], torch.zeros_like(within)))
    return block * WIDTH + torch.searchsorted(inner, within[:, None], right=True).squeeze(1)
