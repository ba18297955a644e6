"""Atoms, which a writer takes, and soft targets, which a reader gives.

Atoms are ragged, so they are kept in compressed-row form: counts per token and one flat run of values. The letter N
counts the atoms of all tokens together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Atoms(NamedTuple):
    """Stored (id, code) pairs of T tokens, not yet encoded; the codec defines the codes."""

    counts_T: Tensor
    """int32: atoms of each token."""
    ids_N: Tensor
    """int32 vocabulary ids, token after token; distinct within a token."""
    codes_N: Tensor
    """int32, one for each of `ids_N`."""
    rest_T: Tensor
    """uint8 code of the mass outside the atoms; empty where the codec keeps none."""

    @classmethod
    def of(cls, ids_TK: Tensor, codes_TK: Tensor, rest_T: Tensor | None = None) -> Atoms:
        """Atoms in K places a token, on the CPU; a place with id -1 has none."""
        keep_TK = ids_TK >= 0
        rest_T = torch.empty(0, dtype=torch.uint8) if rest_T is None else rest_T
        ids_N, codes_N = ids_TK.masked_select(keep_TK).int(), codes_TK.masked_select(keep_TK).int()
        return cls(keep_TK.sum(-1, dtype=torch.int32), ids_N, codes_N, rest_T)

    @classmethod
    def cat(cls, parts: Sequence[Atoms]) -> Atoms:
        """Atoms of the tokens of all parts, in order."""
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def select(self, keep_T: Tensor) -> Atoms:
        """Atoms of the tokens where `keep_T` (bool) holds, in order."""
        keep_N = keep_T.repeat_interleave(self.counts_T.long())
        rest_T = self.rest_T[keep_T] if len(self.rest_T) else self.rest_T
        return Atoms(self.counts_T[keep_T], self.ids_N[keep_N], self.codes_N[keep_N], rest_T)


class SoftTargets(NamedTuple):
    """Sparse teacher distributions of T tokens, padded to K atoms.

    A row of codec `threshold` sums to 1 on average only; a row that is not covered is all zeros.
    """

    ids_TK: Tensor
    """int64 vocabulary ids; 0 where padded."""
    probs_TK: Tensor
    """float32; 0 where padded."""
    covered_T: Tensor
    """bool: the cache holds a target for this token."""
    label_logprob_T: Tensor
    """float32 nats, teacher's log-probability of the label; kept in a byte: |error| of its size x <= 32 is below
    sqrt(32 x) / 254 + 0.0002, larger ones read as 32."""
    entropy_T: Tensor
    """float32 nats; kept in a byte: |error| <= sqrt(x log V) / 255 + 0.0001."""

    def to(self, device: torch.device | str) -> SoftTargets:
        return SoftTargets(*(column.to(device, non_blocking=True) for column in self))
