"""Finding ids by cumulative probability without a cumulative sum over the vocabulary.

Probabilities are summed in blocks; the running sum (fp64, so that no small probability is lost in a large sum) goes
over blocks only, and ids within a block are summed only where a draw falls. That is one cheap pass over T x V.
"""

import torch
from torch import Tensor

WIDTH = 32


def whole_blocks(p_TV: Tensor) -> Tensor:
    """The same as float32 [T, V], V padded with zeros to whole blocks; a copy only where it has to be."""
    missing = -p_TV.shape[1] % WIDTH
    p_TV = p_TV.float().contiguous()
    return torch.nn.functional.pad(p_TV, (0, missing)) if missing else p_TV


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
    if p_TV.device.type == "cpu":
        from distill.cache.codecs import compiled  # loads numba, which a GPU does not need

        indices = torch.empty_like(block)
        compiled.locate(p_TV.view(-1).numpy(), WIDTH, block.numpy(), within.numpy(), indices.numpy())
        return indices
    return locate_by_sums(p_TV, block, within)


def locate_by_sums(p_TV: Tensor, block: Tensor, within: Tensor) -> Tensor:
    """`locate` on any device."""
    inner = p_TV.view(-1, WIDTH)[block].double().cumsum_(-1)
    # The two sums of a block differ in their last bits; a draw beyond the second one belongs to its last id.
    within = torch.minimum(within, torch.nextafter(inner[:, -1], torch.zeros_like(within)))
    return block * WIDTH + torch.searchsorted(inner, within[:, None], right=True).squeeze(1)
