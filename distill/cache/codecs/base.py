"""The face that all codecs share."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from distill.cache.targets import Atoms, pad


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
