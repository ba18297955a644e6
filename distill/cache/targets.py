"""What goes into the cache (`Atoms`) and what comes out of it (`SoftTargets`).

Atoms are ragged, so they are kept in compressed-row form: counts per token and one flat run of values. The letter
N stands for the atoms of all tokens together: `N` those with a code of their own (heads), `M` those without (tails).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Atoms(NamedTuple):
    """Stored (id, weight) pairs of T tokens, not yet packed.

    Within a token, ids are distinct in each of the two groups. What a code means is the codec's business.
    """

    heads_T: Tensor
    """int32: atoms with a code."""
    tails_T: Tensor
    """int32: atoms that all have the codec's one tail weight."""
    head_ids_N: Tensor
    """int32 vocabulary ids, token after token."""
    codes_N: Tensor
    """uint8, one for each of `head_ids_N`."""
    tail_ids_M: Tensor
    """int32 vocabulary ids, token after token."""
    rest_T: Tensor
    """uint8 code of the mass outside the atoms; empty where the codec keeps none."""

    @classmethod
    def cat(cls, parts: Sequence[Atoms]) -> Atoms:
        """Atoms of the tokens of all parts, in order."""
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def select(self, keep_T: Tensor) -> Atoms:
        """Atoms of the tokens where `keep_T` (bool) holds, in order."""
        heads_N, tails_M = (keep_T.repeat_interleave(counts.long()) for counts in (self.heads_T, self.tails_T))
        rest_T = self.rest_T[keep_T] if len(self.rest_T) else self.rest_T
        head_ids_N, codes_N = self.head_ids_N[heads_N], self.codes_N[heads_N]
        return Atoms(self.heads_T[keep_T], self.tails_T[keep_T], head_ids_N, codes_N, self.tail_ids_M[tails_M], rest_T)

    def cpu(self) -> Atoms:
        return Atoms(*(column.cpu() for column in self))


class SoftTargets(NamedTuple):
    """Sparse teacher distributions of T tokens, padded to K atoms.

    A row sums to 1 on average only (codec `threshold`); a row that is not covered is all zeros.
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


def pad(atoms: Atoms, head_probs_N: Tensor, tail_prob: float) -> tuple[Tensor, Tensor]:
    """Rows of ids int64 [T, K] and probabilities float32 [T, K], heads first; K is the longest row, at least 1."""
    heads_T, tails_T = atoms.heads_T.long(), atoms.tails_T.long()
    width = max(int((heads_T + tails_T).max()) if len(heads_T) else 0, 1)
    ids_TK = torch.zeros(len(heads_T), width, dtype=torch.int64, device=heads_T.device)
    probs_TK = torch.zeros(len(heads_T), width, device=heads_T.device)
    row_T = torch.arange(len(heads_T), device=heads_T.device) * width
    for counts_T, shift_T, ids, probs in (
        (heads_T, row_T, atoms.head_ids_N, head_probs_N),
        (tails_T, row_T + heads_T, atoms.tail_ids_M, tail_prob),
    ):
        # Slot of an atom = its index in the run, moved from the run's start of its token to the token's row.
        start_T = shift_T - (counts_T.cumsum(0) - counts_T)
        slot = torch.arange(len(ids), device=ids.device) + start_T.repeat_interleave(counts_T, output_size=len(ids))
        ids_TK.view(-1)[slot] = ids.long()
        probs_TK.view(-1)[slot] = probs
    return ids_TK, probs_TK
