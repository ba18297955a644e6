"""The order of samples in training: pure functions of position, so that resuming is arithmetic.

Corpora are mixed by a fixed pattern of `PATTERN` positions, repeated, in which each has its exact quota, evenly
spread. How many samples of a corpus lie before a position is therefore closed-form; it gives the epoch and the place in
it, and a keyed permutation of that epoch gives the sample. The permutation is a Feistel network over the least power of
two that holds the corpus, walked until it falls inside (Black, Rogaway: Ciphers with arbitrary finite domains, 2002).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from distill.cache.codecs.uniform import GOLDEN, mix
from distill.config.errors import CacheError, ConfigError
from distill.config.schema import ReplayOrder

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

PATTERN = 1 << 14
ROUNDS = 8
FORMAT = 1
"""Of a description: raise it when the same one would give another order."""


class StreamSamples(NamedTuple):
    """Samples of a stretch of the stream."""

    corpus: Ints
    """Their corpora, by number."""
    sample_ids: Ints
    """Their ids, each in its corpus."""


class Stream:
    """An endless order of samples; every sample of a corpus comes once in each of its epochs.

    Args:
        sizes: samples of each corpus, by name; their order numbers the corpora.
        weights: share of each in the mixture, up to a common factor.
        seed: of the permutations.

    Attributes:
        shares: positions of each corpus among `PATTERN`.

    Raises:
        ConfigError: a weight is not positive, or too small for even one of `PATTERN` positions.
    """

    def __init__(self, sizes: dict[str, int], weights: dict[str, float], seed: int):
        assert sizes and sizes.keys() == weights.keys() and min(sizes.values()) > 0, (sizes, weights)
        self.names, self.sizes, self.weights, self.seed = list(sizes), dict(sizes), dict(weights), seed
        self._sizes_C = np.array([sizes[name] for name in self.names])
        # By name, so that the order of a corpus does not depend on the rest of the mixture.
        self._keys_C = np.array(
            [xxhash.xxh3_64_intdigest(name.encode(), seed % 2**64) for name in self.names], np.uint64
        )
        self._quota_C = _quotas([weights[name] for name in self.names], self.names)
        self.shares: dict[str, int] = dict(zip(self.names, self._quota_C.tolist()))
        spread = [(np.arange(quota) + 0.5) / quota for quota in self._quota_C]
        corpus = np.repeat(np.arange(len(spread)), self._quota_C)
        order = np.lexsort((corpus, np.concatenate(spread)))
        self._corpus_P = corpus[order]
        # How many positions of its corpus come before it within the pattern.
        self._rank_P = np.concatenate([np.arange(quota) for quota in self._quota_C])[order]

    def at(self, positions: Ints) -> StreamSamples:
        """The sample at each position >= 0; int64, of the shape of `positions`."""
        positions = np.asarray(positions, np.int64)
        assert not positions.size or positions.min() >= 0, positions
        turn, place = np.divmod(positions, PATTERN)
        corpus = self._corpus_P[place]
        epoch, index = np.divmod(turn * self._quota_C[corpus] + self._rank_P[place], self._sizes_C[corpus])
        sample_ids = np.empty_like(positions)
        for c, size in enumerate(self._sizes_C):
            mine = corpus == c
            key = _mix(epoch[mine].astype(np.uint64) ^ self._keys_C[c])
            sample_ids[mine] = _permute(index[mine].astype(np.uint64), key, int(size))
        return StreamSamples(corpus, sample_ids)

    def describe(self) -> dict[str, Any]:
        """All that the order depends on, as JSON."""
        corpora = [[name, self.sizes[name], self.weights[name]] for name in self.names]
        return {"order": FORMAT, "seed": self.seed, "corpora": corpora}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> Stream:
        """The stream of a description; keys other than those of `describe` are ignored.

        Raises:
            CacheError: the description is unreadable or of another version.
        """
        if description.get("order") != FORMAT:
            raise CacheError(f"the recorded stream's order is {description.get('order')!r}; this program has {FORMAT}")
        try:
            corpora = description["corpora"]
            sizes, weights = {n: int(s) for n, s, _ in corpora}, {n: float(w) for n, _, w in corpora}
            return cls(sizes, weights, int(description["seed"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CacheError(f"the recorded stream is not readable ({type(error).__name__}: {error!s:.200})") from error


class Replay:
    """Maps a student's positions to those of a teacher that had `planned`; beyond them they start over.

    same: the teacher's order; newest: backwards; late_first: from half-way on, then the first half; own: the stream is
    the student's own, and so are its positions.
    """

    def __init__(self, order: ReplayOrder, planned: int):
        assert planned > 0, planned
        self.order, self.planned = order, planned

    def __call__(self, positions: Ints) -> Ints:
        planned = self.planned
        if self.order is ReplayOrder.own:
            return positions
        if self.order is ReplayOrder.newest:
            return planned - 1 - positions % planned
        return (positions + self._first) % planned

    def furthest(self, position: int) -> int:
        """The greatest of the teacher's positions that the student's first `position` + 1 have."""
        if self.order in (ReplayOrder.same, ReplayOrder.late_first):
            return min(position + self._first, self.planned - 1)
        return self.planned - 1

    @property
    def _first(self) -> int:
        return self.planned // 2 if self.order is ReplayOrder.late_first else 0


def _quotas(weights: list[float], names: list[str]) -> Ints:
    """Positions of the pattern for each corpus: largest remainders, earlier corpora first where they tie."""
    for name, weight in zip(names, weights):
        if not (weight > 0 and math.isfinite(weight)):
            raise ConfigError(f"data.corpora.{name}.weight is {weight}; it must be positive")
    exact = np.array(weights) / math.fsum(weights) * PATTERN
    quotas = np.floor(exact).astype(np.int64)
    quotas[np.argsort(quotas - exact, kind="stable")[: PATTERN - quotas.sum()]] += 1
    for name, weight, quota in zip(names, weights, quotas):
        if quota == 0:
            raise ConfigError(
                f"data.corpora.{name}.weight is {weight} of {math.fsum(weights)} in all; at least 1/{PATTERN} is needed"
            )
    return quotas


def _mix(words: Words) -> Words:
    return mix(torch.from_numpy(words.view(np.int64))).numpy().view(np.uint64)


def _permute(index: Words, key: Words, size: int) -> Words:
    """The place of `index` [n] (below `size`) in the permutation of range(size) that `key` [n] names."""
    bits = max((size - 1).bit_length(), 2)
    low, golden = np.uint64(bits // 2), np.uint64(GOLDEN % 2**64)
    low_mask, high_mask = np.uint64((1 << bits // 2) - 1), np.uint64((1 << (bits - bits // 2)) - 1)
    index = index.copy()
    todo = np.arange(len(index))
    while todo.size:
        left, right = index[todo] >> low, index[todo] & low_mask
        round_key = key[todo]
        for _ in range(ROUNDS // 2):
            round_key = round_key + golden
            left ^= _mix(right ^ round_key) & high_mask
            round_key = round_key + golden
            right ^= _mix(left ^ round_key) & low_mask
        index[todo] = left << low | right
        todo = todo[index[todo] >= size]
    return index
