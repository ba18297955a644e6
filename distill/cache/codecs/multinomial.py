"""Random Sampling KD (arXiv 2503.16870): N independent draws from the distribution, kept as ids and counts."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.cache.codecs import blocks
from distill.cache.codecs.base import Codec
from distill.cache.codecs.uniform import token_keys, uniforms
from distill.cache.targets import Atoms
from distill.config.errors import CacheError


class Multinomial(Codec):
    unbiased = True

    def __init__(self, draws: int):
        if not 1 <= draws <= 255:
            raise CacheError(f"codec multinomial: draws is {draws}; allowed is 1 to 255, since a count is one byte")
        self.draws = draws

    def _select(self, logits_TV: Tensor, lse_T: Tensor, seed: int, sample_ids_T: Tensor, positions_T: Tensor) -> Atoms:
        p_TV = blocks.probabilities(logits_TV, lse_T)
        tokens, width = p_TV.shape
        mass = blocks.cumulate(p_TV)
        draw = torch.arange(self.draws, device=p_TV.device)
        # Sorted, so that equal ids are neighbours; scaled by the summed mass, which is 1 only up to rounding.
        u_TN = uniforms(token_keys(seed, sample_ids_T, positions_T)[:, None], draw).sort(-1).values * mass[:, -1:]
        block_TN = torch.searchsorted(mass, u_TN, right=True).clamp_(max=mass.shape[1] - 1)
        before_TN = torch.where(block_TN > 0, mass.gather(1, (block_TN - 1).clamp(min=0)), 0.0)
        block_TN += torch.arange(tokens, device=p_TV.device)[:, None] * mass.shape[1]
        drawn = blocks.locate(p_TV, block_TN.view(-1), (u_TN - before_TN).view(-1))
        broken_T = ~(mass[:, -1] > 0)
        drawn = drawn[~broken_T.repeat_interleave(self.draws)]
        atoms, counts = drawn.unique_consecutive(return_counts=True)
        return Atoms(
            heads_T=torch.bincount(atoms // width, minlength=tokens).int(),
            tails_T=torch.zeros(tokens, dtype=torch.int32, device=p_TV.device),
            head_ids_N=(atoms % width).int(),
            codes_N=counts.to(torch.uint8),
            tail_ids_M=atoms.new_empty(0, dtype=torch.int32),
            rest_T=counts.new_empty(0, dtype=torch.uint8),
        )

    def weights(self, atoms: Atoms) -> tuple[Tensor, float]:
        return atoms.codes_N.float() / self.draws, 0.0
