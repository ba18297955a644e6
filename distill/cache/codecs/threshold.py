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

from distill.cache.codecs.base import Codec, Picks
from distill.cache.codecs.findings import share
from distill.cache.codecs.logcode import LogCode
from distill.cache.codecs.search import search
from distill.cache.codecs.uniform import uniforms
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
        self.low = float(self.code.levels[0])
        self.heads = min(int(1 / self.low), vocab_size)

    def _pick(self, logits_TV: Tensor, lse_T: Tensor, keys_T: Tensor) -> Picks:
        tail = torch.arange(int(1 / self.tau) + 2, device=keys_T.device)
        points_TK = (tail + uniforms(keys_T[:, None], 0)) * self.tau
        found = search(logits_TV, lse_T, points_TK, self.low, self.heads)
        ids_TH = found.heads_TH.clamp(min=0).long()
        shares_TH = share(logits_TV.gather(1, ids_TH), found, logits_TV.shape[1])
        return Picks(torch.cat([found.heads_TH, found.ids_TK], 1), shares_TH, keys_T, found.entropy_T)

    def atoms(self, picks: Picks) -> Atoms:
        codes_TK = torch.zeros_like(picks.ids_TK)
        heads_TH = picks.ids_TK[:, : self.heads]
        head_TH = heads_TH >= 0
        dice_N = uniforms(picks.keys_T[:, None], heads_TH.long() + 1)[head_TH]
        codes_TK[:, : self.heads][head_TH] = 1 + self.code.unbiased(picks.values_TH[head_TH].float(), dice_N).int()
        return Atoms.of(picks.ids_TK, codes_TK)

    def probs(self, atoms: Atoms) -> Tensor:
        heads = self.code.decode((atoms.codes_N - 1).clamp(min=0))
        return torch.where(atoms.codes_N > 0, heads, self.tau)
