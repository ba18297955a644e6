"""The search for drawn ids on a CPU, compiled by numba without the GIL: the sums of `blocks`, in the same order."""

import numpy as np
from numba import njit

from distill.cache.jit import compiled


@njit(inline="always")
def _walk(p_N, at, end, within, mass, place):  # type: ignore[no-untyped-def]
    """Adds up from `at` until the mass is more than `within`, at most to `end`; `place` is the last id that added any.

    A block's own sum may be less than a draw in its last bits: then its last id with mass takes it.
    """
    while at < end and not mass > within:
        more = mass + p_N[at]
        if more > mass:
            mass, place = more, at
        at += 1
    return at, mass, place


@compiled
def locate(p_N, width, block_M, within_M, found_M):  # type: ignore[no-untyped-def]
    """See `blocks.locate`."""
    for m in range(len(block_M)):
        start = block_M[m] * width
        _, _, found_M[m] = _walk(p_N, start, start + width, within_M[m], 0.0, start)


@compiled
def draw(p_TV, mass_TB, points_TN, width, counts_T, ids_N, codes_N):  # type: ignore[no-untyped-def]
    """Ids at the points of each row's running mass, ascending, and how many points fell on each; returns how many ids.

    A row without mass, or with NaN for its mass, has none.
    """
    tokens, blocks = mass_TB.shape
    p_N = p_TV.reshape(-1)
    atoms = 0
    for t in range(tokens):
        if not mass_TB[t, blocks - 1] > 0:
            continue
        row = t * p_TV.shape[1]
        first, block, last = atoms, 0, -1
        at, mass, place = row, 0.0, row
        for n in range(points_TN.shape[1]):
            point = points_TN[t, n]
            while block < blocks - 1 and mass_TB[t, block] <= point:
                block += 1
            start = row + block * width
            if block != last:
                last, at, mass, place = block, start, 0.0, start
            before = mass_TB[t, block - 1] if block else 0.0
            at, mass, place = _walk(p_N, at, start + width, point - before, mass, place)
            if atoms > first and ids_N[atoms - 1] == place - row:
                codes_N[atoms - 1] += 1
            else:
                ids_N[atoms], codes_N[atoms] = np.int32(place - row), 1
                atoms += 1
        counts_T[t] = atoms - first
    return atoms
