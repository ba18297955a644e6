"""Exp-Golomb decoder of non-negative numbers below 2**24 in numpy; `record` gives the code.

Numbers come as runs: a run is one column of one sample, with an order of its own.
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
        if (bits > 24).any():
            raise ValueError("a number of more than 24 bits")
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
