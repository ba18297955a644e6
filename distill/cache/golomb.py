"""Exp-Golomb coder of non-negative numbers below 2**24 in numpy, without a loop over numbers.

The code is given in `layout`. Numbers come as runs: a run is one column of one sample, with an order of its own.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]

ALL_ZERO = 255


def exclusive(counts: Ints) -> Ints:
    """Where each run starts."""
    return np.cumsum(counts) - counts


def low_bits(values: Ints, orders: Ints) -> Ints:
    """Bits b that a number puts into `low`; its unary part has b - order + 1."""
    return (np.frexp((values + (1 << orders)).astype(np.float64))[1] - 1).astype(np.int64)


def choose_orders(values: Ints, runs: Ints) -> Ints:
    """The cheapest order of each run among four near its mean bit length; ALL_ZERO if it is empty or all zeros."""
    length = low_bits(values, np.zeros_like(values))
    total = run_sums(length, runs)
    guess = total // np.maximum(runs, 1)
    best, cheapest = np.full(len(runs), ALL_ZERO, np.int64), np.full(len(runs), np.iinfo(np.int64).max)
    for step in range(-2, 2):
        orders = np.clip(guess + step, 0, 23)
        each = np.repeat(orders, runs)
        bits = run_sums(2 * low_bits(values, each) - each + 1, runs)
        better = (total > 0) & (bits < cheapest)
        best[better], cheapest[better] = orders[better], bits[better]
    return best


def run_sums(values: Ints, runs: Ints) -> Ints:
    """Sum of each run; 0 for an empty one."""
    total = np.concatenate([[0], np.cumsum(values)])
    ends = np.cumsum(runs)
    return total[ends] - total[ends - runs]


def encode(values: Ints, runs: Ints, orders: Ints, samples: int) -> tuple[Bytes, Ints, Bytes, Ints]:
    """Codes runs of numbers; `samples` equal groups of consecutive runs each start at a whole byte.

    Runs of order ALL_ZERO must hold no numbers. Returns unary, its end in bytes for each sample, low, its ends.
    """
    each = np.repeat(orders, runs)
    bits = low_bits(values, each)
    per_sample = runs.reshape(samples, -1).sum(1)

    last, unary_ends, unary_size = _place(bits - each + 1, per_sample)
    unary = np.zeros(unary_size * 8, np.uint8)
    unary[last - 1] = 1

    last, low_ends, low_size = _place(bits, per_sample)
    low = np.zeros(low_size * 8, np.uint8)
    number = values + (1 << each)
    for bit in range(int(bits.max(initial=0))):
        has = bits > bit
        low[last[has] - 1 - bit] = (number[has] >> bit) & 1
    return np.packbits(unary), unary_ends, np.packbits(low), low_ends


def _place(lengths: Ints, per_sample: Ints) -> tuple[Ints, Ints, int]:
    """Bit after each number, byte after each sample, bytes in all."""
    after = np.cumsum(lengths)
    total = np.concatenate([[0], after])
    ends = np.cumsum(per_sample)
    start = total[ends - per_sample]
    ends_bytes = np.cumsum((total[ends] - start + 7) // 8)
    aligned = np.concatenate([[0], ends_bytes[:-1]]) * 8
    return after + np.repeat(aligned - start, per_sample), ends_bytes, int(ends_bytes[-1]) if len(ends_bytes) else 0


class Decoder:
    """Reads the numbers of several samples in parallel, some columns at a time.

    unary, low: the samples' bytes, sample after sample; their sizes give each sample's bytes.
    """

    def __init__(self, unary: Bytes, unary_sizes: Ints, low: Bytes, low_sizes: Ints):
        ones = np.flatnonzero(np.unpackbits(unary))
        starts = exclusive(unary_sizes) * 8
        self._next = np.searchsorted(ones, starts)
        """Index into the numbers of all samples of the next one of each sample."""
        self.left = np.diff(self._next, append=len(ones))
        """Numbers not read yet of each sample."""
        self._zeros = np.diff(ones, prepend=-1) - 1
        first = self._next[self.left > 0]
        self._zeros[first] = ones[first] - starts[self.left > 0]
        # Four bytes from any place can be read as one word; 24 + 7 bits always fit.
        padded = np.concatenate([low, np.zeros(4, np.uint8)]).astype(np.uint32)
        self._words = (padded[:-3] << 24) | (padded[1:-2] << 16) | (padded[2:-1] << 8) | padded[3:]
        self._bit = exclusive(low_sizes) * 8

    def read(self, runs_BC: Ints, orders_BC: Ints) -> Ints:
        """The next numbers: for each sample, C runs one after the other; order ALL_ZERO reads zeros from nothing."""
        stored_BC = np.where(orders_BC == ALL_ZERO, 0, runs_BC)
        count_B = stored_BC.sum(1)
        start_B = exclusive(count_B)
        if (count_B > self.left).any():
            raise ValueError("more numbers than the record holds")
        index = np.arange(count_B.sum()) + np.repeat(self._next - start_B, count_B)
        each = np.repeat(orders_BC.ravel(), stored_BC.ravel())
        bits = self._zeros[index] + each
        after = np.cumsum(bits)
        total = np.concatenate([[0], after])
        first = after - bits + np.repeat(self._bit - total[start_B], count_B)
        word = self._words[first >> 3].astype(np.int64)
        low = (word >> (32 - (first & 7) - bits)) & ((1 << bits) - 1)
        numbers = low + (1 << bits) - (1 << each)
        self._next = self._next + count_B
        self.left = self.left - count_B
        self._bit = self._bit + total[start_B + count_B] - total[start_B]
        if stored_BC.sum() == runs_BC.sum():
            return numbers
        everything = np.zeros(runs_BC.sum(), np.int64)
        everything[np.repeat((orders_BC != ALL_ZERO).ravel(), runs_BC.ravel())] = numbers
        return everything
