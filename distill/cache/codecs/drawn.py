"""Codecs of N draws from the distribution, kept as ids and how often each was drawn; a row's mass is exactly 1.

`multinomial` draws independently: Random Sampling KD (arXiv 2503.16870). `systematic`, the default, draws at N evenly
spaced points of the running mass with one uniform offset a token, so that an id of probability p is drawn floor(N p) or
ceil(N p) times: the least expected squared error of all unbiased counts of N draws.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from distill.cache.codecs.base import Codec, Picks
from distill.cache.codecs.search import search
from distill.cache.codecs.uniform import uniforms
from distill.cache.targets import Atoms
from distill.config.schema import CodecConfig


class _Drawn(Codec):
    unbiased = True

    def __init__(self, config: CodecConfig, vocab_size: int):
        self.draws = self.total = self.max_atoms = self.max_code = config.draws

    @abstractmethod
    def _points(self, keys_T: Tensor) -> Tensor:
        """float64 [T, N], ascending in [0, 1): where the running mass is drawn."""

    def _pick(self, logits_TV: Tensor, lse_T: Tensor, keys_T: Tensor) -> Picks:
        # Rounding may give 1, where the mass has ended.
        points_TN = self._points(keys_T).clamp_(max=1 - 2**-50)
        found = search(logits_TV, lse_T, points_TN)
        return Picks(found.ids_TK, found.entropy_T.new_empty(len(keys_T), 0), keys_T, found.entropy_T)

    def atoms(self, picks: Picks) -> Atoms:
        ids_TN = picks.ids_TK
        # Equal ids are neighbors; the first of them stands for all.
        again_TN = torch.zeros_like(ids_TN, dtype=torch.bool)
        torch.eq(ids_TN[:, 1:], ids_TN[:, :-1], out=again_TN[:, 1:])
        counts_TN = torch.searchsorted(ids_TN, ids_TN, right=True) - torch.arange(ids_TN.shape[1])
        return Atoms.of(ids_TN.masked_fill(again_TN, -1), counts_TN)

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
