"""The face that all codecs share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from distill.cache.codecs.blocks import probabilities
from distill.cache.targets import Atoms

_CPU_CHUNK = 2**22
"""Probabilities at one time. Their memory (16 MiB) is used again; a larger block would be paged in anew each time, at
three times the cost of computing it."""


class Selection(NamedTuple):
    """What is taken out of dense distributions of T tokens."""

    atoms: Atoms
    entropy_T: Tensor
    """float32 nats, of the dense distribution."""


class Codec(ABC):
    """A rule that turns dense distributions into atoms, and atoms into probabilities."""

    unbiased: bool
    """The expected value of what is decoded is the dense distribution."""
    total: int = 0
    """What the codes of a token add up to; 0: to nothing in particular."""
    max_atoms: int
    """Of a token."""
    max_code: int

    @torch.no_grad()
    def select(
        self, logits_TV: Tensor, lse_T: Tensor, *, seed: int, sample_ids_T: Tensor, positions_T: Tensor
    ) -> Selection:
        """Atoms and entropy of exp(logits - lse), on the device of the logits.

        logits_TV: any float type; lse_T: log-sum-exp of the whole row; sample_ids_T and positions_T (within the
        sample): integers that, with the seed, fix all randomness. A row with NaN gets no sampled atoms.
        """
        tokens, vocab = logits_TV.shape
        inputs = (logits_TV, lse_T, sample_ids_T, positions_T)
        rows = max(1, _CPU_CHUNK // vocab) if logits_TV.device.type == "cpu" else max(tokens, 1)
        parts = [[x[t : t + rows] for x in inputs] for t in range(0, max(tokens, 1), rows)]
        found = [self._part(z_TV, lse, seed, ids, places) for z_TV, lse, ids, places in parts]
        if len(found) == 1:
            return found[0]
        return Selection(Atoms.cat([part.atoms for part in found]), torch.cat([part.entropy_T for part in found]))

    def _part(self, logits_TV: Tensor, lse_T: Tensor, seed: int, ids_T: Tensor, positions_T: Tensor) -> Selection:
        p_TV = probabilities(logits_TV, lse_T)
        # Without the bound an id of logit -inf, which has no share, would give 0 * -inf.
        bounded_TV = logits_TV.clamp(min=torch.finfo(logits_TV.dtype).min)
        mean_T = torch.linalg.vecdot(p_TV[:, : logits_TV.shape[1]], bounded_TV.float())
        return Selection(self._select(p_TV, seed, ids_T, positions_T), lse_T.float() - mean_T)

    @abstractmethod
    def _select(self, p_TV: Tensor, seed: int, sample_ids_T: Tensor, positions_T: Tensor) -> Atoms:
        """Atoms of probabilities [T, V], V padded to whole blocks; they may be overwritten."""

    @abstractmethod
    def probs(self, atoms: Atoms) -> Tensor:
        """float32 [N]: the probability of each atom."""

    def decode(self, atoms: Atoms) -> tuple[Tensor, Tensor]:
        """ids int64 [T, K] and probabilities float32 [T, K], zero where padded; on the CPU."""
        from distill.cache.coder import pad  # compiled; selecting on a GPU needs none of it

        counts_T = atoms.counts_T
        width = max(int(counts_T.max()) if len(counts_T) else 0, 1)
        ids_TK = torch.zeros(len(counts_T), width, dtype=torch.int64)
        probs_TK = torch.zeros(len(counts_T), width)
        pad(*(x.numpy() for x in (counts_T, atoms.ids_N, self.probs(atoms), ids_TK, probs_TK)))
        return ids_TK, probs_TK
