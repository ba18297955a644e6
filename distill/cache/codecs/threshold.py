"""A codec that keeps large probabilities and samples small ones.

Every p >= tau is kept, in a byte whose rounding is unbiased (code 1 + level). Every smaller p is kept with probability
p / tau at weight tau (code 0), by systematic sampling: on the running mass of the small ids in units of tau, one
uniform offset u per token marks the points u, u + 1, u + 2, ...; an id is kept where a point falls into its interval.
Each interval is shorter than 1, so no id is kept twice, and the number of tail atoms is within one of tail mass / tau.
Of all unbiased codecs with that average number of atoms this has the least expected squared error; counted in bytes,
`systematic` has less, because the precision of heads costs more than it saves.
"""

import torch
from torch import Tensor

from distill.cache.codecs import blocks
from distill.cache.codecs.base import Codec
from distill.cache.codecs.logcode import LogCode
from distill.cache.codecs.uniform import token_keys, uniforms
from distill.cache.targets import Atoms
from distill.config.schema import CodecConfig


class Threshold(Codec):
    unbiased = True
    max_code = 256

    def __init__(self, config: CodecConfig, vocab_size: int):
        self.tau = config.tau
        self.draws = 1.0 / self.tau
        self.max_atoms = 2 * int(1 / self.tau) + 3
        # Heads start a hair below tau, so that rounding can never make a tail interval as long as 1.
        self.code = LogCode(self.tau * (1 - 2**-16))

    def _select(self, p_TV: Tensor, seed: int, sample_ids_T: Tensor, positions_T: Tensor) -> Atoms:
        tokens, width = p_TV.shape
        keys_T = token_keys(seed, sample_ids_T, positions_T)

        head = blocks.at_least(p_TV, float(self.code.levels[0]))
        codes = 1 + self.code.unbiased(p_TV.view(-1)[head], uniforms(keys_T[head // width], head % width + 1)).int()
        p_TV = p_TV.clone()
        p_TV.view(-1)[head] = 0.0

        # Points below each running mass; their differences are the points in each block.
        mass = blocks.cumulate(p_TV) / self.tau
        offset_T = uniforms(keys_T, 0)
        points = (mass - offset_T[:, None]).ceil_().clamp_(min=0)
        tails_T = points[:, -1].long()
        total = int(tails_T.sum())
        in_block = points.diff(dim=-1, prepend=points.new_zeros(tokens, 1)).long().view(-1)
        block = torch.arange(len(in_block), device=p_TV.device).repeat_interleave(in_block, output_size=total)
        first = (tails_T.cumsum(0) - tails_T).double() - offset_T
        token = block // mass.shape[1]
        point = torch.arange(total, device=p_TV.device) - first[token]
        before = torch.where(block % mass.shape[1] > 0, mass.view(-1)[(block - 1).clamp(min=0)], 0.0)
        tail = blocks.locate(p_TV, block, (point - before) * self.tau)

        # Heads and tails of a token side by side; both are in order of token and id already.
        flat, order = torch.cat([head, tail]).sort()
        return Atoms(
            counts_T=torch.bincount(flat // width, minlength=tokens).int(),
            ids_N=(flat % width).int(),
            codes_N=torch.cat([codes, codes.new_zeros(len(tail))])[order],
            rest_T=codes.new_empty(0, dtype=torch.uint8),
        )

    def probs(self, atoms: Atoms) -> Tensor:
        heads = self.code.decode((atoms.codes_N - 1).clamp(min=0))
        return torch.where(atoms.codes_N > 0, heads, self.tau)
