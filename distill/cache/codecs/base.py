"""The interface of codecs."""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from distill.cache.codecs.blocks import whole_blocks
from distill.cache.targets import Atoms
from distill.config.schema import CodecConfig

_CPU_CHUNK = 2**22
"""Probabilities computed at one time on a CPU. Their memory (16 MiB) is used again; a larger block would be paged in
anew each time, at three times the cost of computing it."""


class Selection(NamedTuple):
    """Atoms and entropies of dense distributions of T tokens."""

    atoms: Atoms
    entropy_T: Tensor
    """float32 nats, of the dense distribution."""


class Codec(ABC):
    """A rule that turns dense distributions into atoms, and atoms into probabilities."""

    unbiased: bool
    """The expected value of what is decoded is the dense distribution."""
    has_rest: bool = False
    """Atoms keep the mass outside of them, `rest_T`."""
    total: int = 0
    """Sum of the codes of any token; 0: there is no fixed sum."""
    draws: float = math.inf
    """Draws from the distribution that the noise of a token's atoms is like; inf: it has none."""
    max_atoms: int
    """Most atoms of a token."""
    max_code: int
    """Codes of atoms are 0 to `max_code`."""

    @abstractmethod
    def __init__(self, config: CodecConfig, vocab_size: int):
        """Takes those of the configuration's fields, all in their ranges, that its entry in `CODECS` names."""

    @torch.no_grad()
    def select(
        self, logits_TV: Tensor, lse_T: Tensor, *, seed: int, sample_ids_T: Tensor, positions_T: Tensor
    ) -> Selection:
        """Atoms and entropy of exp(logits - lse), on the device of the logits.

        logits_TV: any float type; lse_T: log-sum-exp of the whole row; sample_ids_T and positions_T (within the
        sample): integers that, with the seed, fix all randomness. A row with NaN gets no sampled atoms.
        """
        parts = []
        for rows in _chunks(logits_TV):
            logprobs_TV = torch.sub(logits_TV[rows].float(), lse_T[rows].float()[:, None])
            where = {"sample_ids_T": sample_ids_T[rows], "positions_T": positions_T[rows]}
            parts.append(self.select_probs(logprobs_TV.exp(), logprobs_TV, seed=seed, **where))
        if len(parts) == 1:
            return parts[0]
        return Selection(Atoms.cat([part.atoms for part in parts]), torch.cat([part.entropy_T for part in parts]))

    @torch.no_grad()
    def select_probs(
        self, probs_TV: Tensor, logprobs_TV: Tensor, *, seed: int, sample_ids_T: Tensor, positions_T: Tensor
    ) -> Selection:
        """`select` from probabilities and their logarithms, which are not changed."""
        entropy_T = probs_TV.new_empty(len(probs_TV), dtype=torch.float32)
        least = torch.finfo(logprobs_TV.dtype).min
        for rows in _chunks(probs_TV):
            # Without the bound an id of no probability would give 0 * -inf.
            torch.sum(logprobs_TV[rows].clamp(min=least).mul_(probs_TV[rows]), -1, out=entropy_T[rows])
        return Selection(self._select(whole_blocks(probs_TV), seed, sample_ids_T, positions_T), entropy_T.neg_())

    @abstractmethod
    def _select(self, p_TV: Tensor, seed: int, sample_ids_T: Tensor, positions_T: Tensor) -> Atoms:
        """Atoms of probabilities float32 [T, V], V padded to whole blocks."""

    @abstractmethod
    def probs(self, atoms: Atoms) -> Tensor:
        """float32 [N]: the probability of each atom."""

    def decode(self, atoms: Atoms) -> tuple[Tensor, Tensor]:
        """ids int64 [T, K] and probabilities float32 [T, K], zero where padded; on the CPU."""
        from distill.cache.coder import pad  # loads numba, which selection on a GPU does not need

        counts_T = atoms.counts_T
        width = max(int(counts_T.max()) if len(counts_T) else 0, 1)
        ids_TK = torch.zeros(len(counts_T), width, dtype=torch.int64)
        probs_TK = torch.zeros(len(counts_T), width)
        pad(*(x.numpy() for x in (counts_T, atoms.ids_N, self.probs(atoms), ids_TK, probs_TK)))
        return ids_TK, probs_TK


def _chunks(rows_TV: Tensor) -> list[slice]:
    """Slices of rows that are computed at one time; at least one."""
    tokens, vocab = rows_TV.shape
    size = max(1, _CPU_CHUNK // vocab) if rows_TV.device.type == "cpu" else max(tokens, 1)
    return [slice(t, t + size) for t in range(0, max(tokens, 1), size)]
