"""What every foreign format is read into: sequences, and for each position what was kept of the distribution."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from distill.config.errors import CacheError

Array = NDArray[Any]

NOT_LOGPROBS = 0.01
"""Nats above 0 that rounding may give a log-probability; more is something else."""
_MAX_ID = 2**24 - 1


class Entries(NamedTuple):
    """Sparse distributions of P positions."""

    counts_P: NDArray[np.int64]
    """Entries of each position; 0: the format has no distribution there."""
    ids_N: NDArray[np.int64]
    """Position after position; distinct within one."""
    logprobs_N: NDArray[np.float64]
    """Finite."""


@dataclass(frozen=True)
class ForeignSequence:
    """One sequence of n tokens; position j of P follows tokens 0 to j and is about token j + 1."""

    where: str
    """File and place in it, for messages."""
    tokens: NDArray[np.int64] | None
    """[n]; None: the format does not keep them."""
    entries: Entries | None = None
    dense_PV: NDArray[np.float32] | None = None
    """Instead of entries: logits, up to a constant of each position. A position of NaN has no distribution."""
    label_logprobs_P: NDArray[np.float64] | None = None
    """Of token j + 1, where the format keeps it whether or not it is among the entries; NaN: unknown."""

    @property
    def positions(self) -> int:
        """P."""
        if self.entries is not None:
            return len(self.entries.counts_P)
        assert self.dense_PV is not None
        return len(self.dense_PV)


NO_TAIL = "the mass of the rest is known, its ids are not, so the tail is not taught"
"""The bias of entries whose log-probabilities are over the whole vocabulary."""


@dataclass(frozen=True)
class SourceInfo:
    """What is the same for everything that a source yields."""

    format: str
    bias: str
    """One sentence: what is missing, and its effect."""
    k: int | None
    """Entries of a position at most; None: dense."""


class ForeignSource(Protocol):
    """Files of one foreign format. Opening it raises CacheError for problems that show without reading everything."""

    info: SourceInfo

    def __iter__(self) -> Iterator[ForeignSequence]:
        """Raises CacheError for damaged files, naming the file and the place in it."""
        ...


def entries(counts_P: Array, ids_N: Array, logprobs_N: Array, where: str, k: int, *, logits: bool = False) -> Entries:
    """The k largest entries of each position; all are checked, and those of probability 0 are left out.

    logits: the values are not normalised: each position's are made so, which spreads the mass of what is missing.

    Raises:
        CacheError: values that are no log-probabilities, a negative id, or an id twice in a position.
    """
    counts_P, ids_N = np.asarray(counts_P, np.int64), np.asarray(ids_N, np.int64)
    logprobs_N = np.asarray(logprobs_N, np.float64)
    position_N = np.repeat(np.arange(len(counts_P)), counts_P)
    if logits:
        top_P = np.full(len(counts_P), -np.inf)
        np.maximum.at(top_P, position_N, logprobs_N)
        shifted_N = logprobs_N - top_P[position_N]
        sum_P = np.bincount(position_N, np.exp(shifted_N), minlength=len(counts_P))
        logprobs_N = shifted_N - np.log(sum_P)[position_N]
    if (bad := np.flatnonzero(np.isnan(logprobs_N) | (logprobs_N > NOT_LOGPROBS))).size:
        at, value = position_N[bad[0]], logprobs_N[bad[0]]
        raise CacheError(f"{where}, position {at}: a value is {value:.6g}; log-probabilities are at most 0")
    if (keep := logprobs_N > -np.inf).sum() < len(keep):
        ids_N, logprobs_N, position_N = ids_N[keep], logprobs_N[keep], position_N[keep]
        counts_P = np.bincount(position_N, minlength=len(counts_P))
    if (bad := np.flatnonzero(ids_N < 0)).size:
        raise CacheError(f"{where}, position {position_N[bad[0]]}: id is {ids_N[bad[0]]}; ids are at least 0")
    if len(ids_N) and ids_N.max() > _MAX_ID:
        raise CacheError(f"{where}: id is {ids_N.max()}; ids of a vocabulary are below 2**24")
    keys = np.sort(position_N << 24 | ids_N)  # one sort of one number
    if (twice := np.flatnonzero(keys[1:] == keys[:-1])).size:
        position, token = divmod(int(keys[twice[0]]), _MAX_ID + 1)
        raise CacheError(f"{where}, position {position}: id {token} comes twice")
    return _largest(Entries(counts_P, ids_N, logprobs_N), k)


def _largest(all_of: Entries, k: int) -> Entries:
    """The k entries of greatest probability of each position; of equals those that come first."""
    if not len(all_of.counts_P) or all_of.counts_P.max() <= k:
        return all_of
    position_N = np.repeat(np.arange(len(all_of.counts_P)), all_of.counts_P)
    order = np.lexsort((-all_of.logprobs_N, position_N))
    within = np.arange(len(order)) - np.repeat(np.cumsum(all_of.counts_P) - all_of.counts_P, all_of.counts_P)
    keep = np.sort(order[within < k])
    return Entries(np.minimum(all_of.counts_P, k), all_of.ids_N[keep], all_of.logprobs_N[keep])
