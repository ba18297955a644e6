"""Codecs of N draws from the distribution, kept as ids and how often each was drawn; a row's mass is exactly 1.

`multinomial` draws independently: Random Sampling KD (arXiv 2503.16870). `systematic`, the default, draws at N evenly
spaced points of the running mass with one uniform offset a token, so that an id of probability p is drawn floor(N p) or
ceil(N p) times: the least expected squared error of all unbiased counts of N draws.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from distill.cache.codecs import blocks
from distill.cache.codecs.base import Codec
from distill.cache.codecs.uniform import token_keys, uniforms
from distill.cache.targets import Atoms
from distill.config.schema import CodecConfig


class _Drawn(Codec):
    unbiased = True

    def __init__(self, config: CodecConfig, vocab_size: int):
        self.draws = self.total = self.max_atoms = self.max_code = config.draws

    @abstractmethod
    def _points(self, keys_T: Tensor) -> Tensor:
        """float64 [T, N], ascending in [0, 1): where the running mass is drawn."""

    def _select(self, p_TV: Tensor, seed: int, sample_ids_T: Tensor, positions_T: Tensor) -> Atoms:
        mass_TB = blocks.cumulate(p_TV)
        # Scaled by the summed mass, which is 1 only up to rounding.
        points_TN = self._points(token_keys(seed, sample_ids_T, positions_T)) * mass_TB[:, -1:]
        return (_compiled if p_TV.device.type == "cpu" else by_tensors)(p_TV, mass_TB, points_TN)

    def probs(self, atoms: Atoms) -> Tensor:
        return atoms.codes_N.float() / self.draws


class Multinomial(_Drawn):
    def _points(self, keys_T: Tensor) -> Tensor:
        # Sorted, so that equal ids are neighbors.
        return uniforms(keys_T[:, None], torch.arange(self.draws, device=keys_T.device)).sort(-1).values


class Systematic(_Drawn):
    def _points(self, keys_T: Tensor) -> Tensor:
        draw = torch.arange(self.draws, device=keys_T.device)
        return (draw + uniforms(keys_T[:, None], 0)) / self.draws


def _compiled(p_TV: Tensor, mass_TB: Tensor, points_TN: Tensor) -> Atoms:
    from distill.cache.codecs import compiled  # loads numba, which a GPU does not need

    counts_T = torch.zeros(len(p_TV), dtype=torch.int32)
    ids_N, codes_N = (torch.empty(points_TN.numel(), dtype=torch.int32) for _ in range(2))
    atoms = compiled.draw(
        p_TV.numpy(), mass_TB.numpy(), points_TN.numpy(), blocks.WIDTH, counts_T.numpy(), ids_N.numpy(), codes_N.numpy()
    )
    return Atoms(counts_T, ids_N[:atoms].clone(), codes_N[:atoms].clone(), torch.empty(0, dtype=torch.uint8))


def by_tensors(p_TV: Tensor, mass_TB: Tensor, points_TN: Tensor) -> Atoms:
    """Atoms at `points_TN` of the running mass, on any device."""
    tokens, width = p_TV.shape
    block_TN = torch.searchsorted(mass_TB, points_TN, right=True).clamp_(max=mass_TB.shape[1] - 1)
    before_TN = torch.where(block_TN > 0, mass_TB.gather(1, (block_TN - 1).clamp(min=0)), 0.0)
    block_TN += torch.arange(tokens, device=p_TV.device)[:, None] * mass_TB.shape[1]
    drawn = blocks.locate_by_sums(p_TV, block_TN.view(-1), (points_TN - before_TN).view(-1))
    broken_T = ~(mass_TB[:, -1] > 0)
    drawn = drawn[~broken_T.repeat_interleave(points_TN.shape[1])]
    atoms, counts = drawn.unique_consecutive(return_counts=True)
    return Atoms(
        counts_T=torch.bincount(atoms // width, minlength=tokens).int(),
        ids_N=(atoms % width).int(),
        codes_N=counts.int(),
        rest_T=counts.new_empty(0, dtype=torch.uint8),
    )
