"""The k largest probabilities and the mass of all others: the biased baseline of every other toolkit.

Decoded rows are scaled so that 1 - sum(probs_TK) is the stored residual mass; the sum of k rounded values would
otherwise miss it by more than the residual of a peaked row.
"""

import torch
from torch import Tensor

from distill.cache.codecs.base import Codec
from distill.cache.codecs.logcode import LogCode
from distill.cache.targets import Atoms
from distill.config.schema import CodecConfig


class TopK(Codec):
    unbiased = False
    has_rest = True
    max_code = 255

    def __init__(self, config: CodecConfig, vocab_size: int):
        self.k = self.max_atoms = config.k
        self.vocab_size = vocab_size
        self.code = LogCode(1e-6)

    def _select(self, p_TV: Tensor, seed: int, sample_ids_T: Tensor, positions_T: Tensor) -> Atoms:
        p_TK, ids_TK = p_TV[:, : self.vocab_size].topk(self.k, dim=-1, sorted=False)
        p_TK = p_TK.double().nan_to_num_(0.0)
        return Atoms(
            counts_T=torch.full((len(p_TK),), self.k, dtype=torch.int32, device=p_TK.device),
            ids_N=ids_TK.reshape(-1).int(),
            codes_N=self.code.nearest(p_TK.reshape(-1)).int(),
            rest_T=self.code.nearest(1 - p_TK.sum(-1)),
        )

    def entries(self, counts_T: Tensor, ids_N: Tensor, probs_N: Tensor, rest_T: Tensor) -> Atoms:
        """Atoms of distributions of which only these entries, at most k a token, and the rest's mass are known."""
        return Atoms(counts_T.int(), ids_N.int(), self.code.nearest(probs_N).int(), self.code.nearest(rest_T))

    def probs(self, atoms: Atoms) -> Tensor:
        # In fp64, so that the order of the atoms does not show.
        probs_N = self.code.decode(atoms.codes_N).double()
        row_N = torch.repeat_interleave(atoms.counts_T.long(), output_size=len(probs_N))
        sum_T = probs_N.new_zeros(len(atoms.counts_T)).index_add_(0, row_N, probs_N)
        scale_T = (1 - self.code.decode(atoms.rest_T).double()) / sum_T
        return (probs_N * scale_T[row_N]).float()
