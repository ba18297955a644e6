"""The face that all codecs share."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from distill.cache.targets import Atoms, pad

_CPU_CHUNK = 2**22
"""Probabilities at one time. Their memory (16 MiB) is used again; a larger block would be paged in anew each time, at
three times the cost of computing it."""


class Codec(ABC):
    """A rule that turns dense distributions into atoms, and atoms into probabilities."""

    unbiased: bool
    """The expected value of what is decoded is the dense distribution."""

    @torch.no_grad()
    def select(
        self, logits_TV: Tensor, lse_T: Tensor, *, seed: int, sample_ids_T: Tensor, positions_T: Tensor
    ) -> Atoms:
        """Atoms of exp(logits - lse), on the device of the logits.

        logits_TV: any float type; lse_T: log-sum-exp of the whole row; sample_ids_T and positions_T (within the
        sample): integers that, with the seed, fix all randomness. A row with NaN gets no sampled atoms.
        """
        tokens, vocab = logits_TV.shape
        if logits_TV.device.type == "cpu" and tokens * vocab > _CPU_CHUNK:
            rows = max(1, _CPU_CHUNK // vocab)
            inputs = (logits_TV, lse_T, sample_ids_T, positions_T)
            parts = [[x[t : t + rows] for x in inputs] for t in range(0, tokens, rows)]
            return Atoms.cat([self._select(z_TV, lse, seed, ids, places) for z_TV, lse, ids, places in parts])
        return self._select(logits_TV, lse_T, seed, sample_ids_T, positions_T)

    @abstractmethod
    def _select(
        self, logits_TV: Tensor, lse_T: Tensor, seed: int, sample_ids_T: Tensor, positions_T: Tensor
    ) -> Atoms: ...

    @abstractmethod
    def weights(self, atoms: Atoms) -> tuple[Tensor, float]:
        """Probabilities float32 [N] of the head atoms, and the one of every tail atom."""

    def decode(self, atoms: Atoms) -> tuple[Tensor, Tensor]:
        """ids int64 [T, K] and probabilities float32 [T, K], zero where padded."""
        return pad(atoms, *self.weights(atoms))
