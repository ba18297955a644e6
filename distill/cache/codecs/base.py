"""The interface of codecs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distill.cache.codecs.search import search
from distill.cache.codecs.uniform import token_keys
from distill.cache.targets import Atoms
from distill.config.schema import CodecConfig

_CPU_CHUNK = 2**22
"""Logits taken at one time on a CPU. Memory of that size (16 MiB) is used again; a larger copy would be paged in anew
each time, at three times the cost of making it."""


class Selection(NamedTuple):
    """Atoms and entropies of dense distributions of T tokens, on the CPU."""

    atoms: Atoms
    entropy_T: Tensor
    """float32 nats, of the dense distribution."""


class Picks(NamedTuple):
    """What a codec takes out of dense distributions of T tokens, on their device.

    Shapes do not depend on the distributions, so no host waits for a device; `Codec.atoms` makes the rest of it.
    """

    ids_TK: Tensor
    """int32; -1 where a place has no id."""
    values_TH: Tensor
    """What the codec makes the codes of some ids from; H may be 0."""
    keys_T: Tensor
    """int64, of the token's random numbers."""
    entropy_T: Tensor
    """float32 nats, of the dense distribution; NaN for a row that is not finite."""

    @classmethod
    def cat(cls, parts: Sequence[Picks]) -> Picks:
        """Picks of the tokens of all parts, in order."""
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def cpu(self) -> Picks:
        return Picks(*(column.cpu() for column in self))


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

    def select(
        self, logits_TV: Tensor, lse_T: Tensor, *, seed: int, sample_ids_T: Tensor, positions_T: Tensor
    ) -> Selection:
        """Atoms and entropy of exp(logits - lse): `pick` and `atoms` in one, for callers that may wait."""
        picks = self.pick(logits_TV, lse_T, seed=seed, sample_ids_T=sample_ids_T, positions_T=positions_T).cpu()
        return Selection(self.atoms(picks), picks.entropy_T)

    @torch.no_grad()
    def pick(self, logits_TV: Tensor, lse_T: Tensor, *, seed: int, sample_ids_T: Tensor, positions_T: Tensor) -> Picks:
        """What `atoms` needs of rows of logits, on their device.

        logits_TV: any float type, read only; lse_T: log-sum-exp of the whole row; sample_ids_T and positions_T (within
        the sample): integers that, with the seed, fix all randomness. A row with NaN gets no sampled atoms.
        """
        keys_T = token_keys(seed, sample_ids_T, positions_T)
        chunks = _chunks(logits_TV)
        parts = [self._pick(logits_TV[rows].float().contiguous(), lse_T[rows], keys_T[rows]) for rows in chunks]
        return parts[0] if len(parts) == 1 else Picks.cat(parts)

    @abstractmethod
    def _pick(self, logits_TV: Tensor, lse_T: Tensor, keys_T: Tensor) -> Picks:
        """`pick` of some rows: logits float32 and contiguous; of `keys_T` come all random numbers (`uniforms`)."""

    @staticmethod
    def entropy(logits_TV: Tensor, lse_T: Tensor) -> Tensor:
        """`Picks.entropy_T` of float32 logits, for codecs that do not `search`."""
        return search(logits_TV, lse_T, logits_TV.new_empty(len(logits_TV), 0, dtype=torch.float64)).entropy_T

    @abstractmethod
    def atoms(self, picks: Picks) -> Atoms:
        """Atoms of what `pick` took, once it is on the CPU."""

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
