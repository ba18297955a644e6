"""The k largest probabilities and the mass of all others: the biased baseline of every other toolkit.

Decoded rows are scaled so that 1 - sum(probs_TK) is the stored residual mass; the sum of k rounded values would
otherwise miss it by more than the residual of a peaked row.
"""

import torch
from torch import Tensor

from distill.cache.codecs.base import Codec, Picks
from distill.cache.codecs.findings import share
from distill.cache.codecs.logcode import LogCode
from distill.cache.codecs.search import search
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

    def _pick(self, logits_TV: Tensor, lse_T: Tensor, keys_T: Tensor) -> Picks:
        found = search(logits_TV, lse_T, keys_T.new_empty(len(keys_T), 0, dtype=torch.float64))
        ids_TK = largest(logits_TV, found.total_T > 0, self.k)
        shares_TK = share(logits_TV.gather(1, ids_TK), found, logits_TV.shape[1])
        return Picks(ids_TK.int(), shares_TK, keys_T, found.entropy_T)

    def atoms(self, picks: Picks) -> Atoms:
        shares_TK = picks.values_TH.nan_to_num(0.0)
        return Atoms.of(picks.ids_TK, self.code.nearest(shares_TK), self.code.nearest(1 - shares_TK.sum(-1)))

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


def largest(logits_TV: Tensor, finite_T: Tensor, k: int) -> Tensor:
    """Ids [T, k] of the k largest logits; of equal ones the least ids, where `topk` takes others on other devices.

    The first k ids where a row is not finite.
    """
    values_TK, ids_TK = logits_TV.topk(min(k + 1, logits_TV.shape[1]))
    next_T1, values_TK, ids_TK = values_TK[:, k:], values_TK[:, :k], ids_TK[:, :k]
    if logits_TV.device.type == "cpu":  # where a look at what is tied costs no waiting
        tied = (next_T1 == values_TK[:, -1:]).any(-1).nonzero().squeeze(1)
        ids_TK[tied] = _first_of_equal(logits_TV[tied], values_TK[tied], ids_TK[tied])
    else:
        ids_TK = _first_of_equal(logits_TV, values_TK, ids_TK)
    return torch.where(finite_T[:, None], ids_TK, torch.arange(k, device=ids_TK.device))


def _first_of_equal(logits_TV: Tensor, values_TK: Tensor, ids_TK: Tensor) -> Tensor:
    """The k ids, with the least of all ids that are equal to the last one in the places of those that are."""
    vocab, k = logits_TV.shape[1], ids_TK.shape[1]
    least_T1 = values_TK[:, -1:]
    order_V = torch.arange(vocab, 0, -1, dtype=torch.int32, device=ids_TK.device)
    equal_TK = torch.where(logits_TV == least_T1, order_V, 0).topk(k).indices
    above_TK = values_TK > least_T1
    place_TK = torch.arange(k, device=ids_TK.device) - above_TK.sum(-1, keepdim=True)
    return torch.where(above_TK, ids_TK, equal_TK.gather(1, place_TK.clamp(min=0)))
