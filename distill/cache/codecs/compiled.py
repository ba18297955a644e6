"""`search` on a CPU, compiled by numba without the GIL: the arithmetic of `fixed_point`, and no tensor of weights."""

import numpy as np
from numba import njit

from distill.cache.codecs import fixed_point
from distill.cache.jit import compiled

WIDTH = 128
"""Ids of a block. One without a point is passed over by its sum; weights of the others are made again, which takes less
than to keep those of a row."""
_LOG2_E, _ROUND, _LN2_HIGH, _LN2_LOW, _C5, _C4, _C3, _C2, _C1, _C0, _LEAST = (
    np.float32(getattr(fixed_point, name))
    for name in ("LOG2_E", "ROUND", "LN2_HIGH", "LN2_LOW", "C5", "C4", "C3", "C2", "C1", "C0", "LEAST")
)
_ONE, _MANTISSA, _NATS = np.float32(1), np.float32(2**fixed_point.MANTISSA), np.float32(-(2**fixed_point.NATS))
_SPREAD = fixed_point.MANTISSA + fixed_point.NATS


@njit(inline="always")
def _split(logits_V, first, top, mantissa_W, shift_W, nats_W):  # type: ignore[no-untyped-def]
    """See `fixed_point`; returns how many logits there are. Apart from 64-bit loops, or none is vectorized."""
    count = min(WIDTH, len(logits_V) - first)
    for i in range(count):
        below = logits_V[first + i] - top
        below = below if below > _LEAST else _LEAST
        whole = (below * _LOG2_E + _ROUND) - _ROUND
        rest = (below - whole * _LN2_HIGH) - whole * _LN2_LOW
        value = rest * _C5 + _C4
        value = value * rest + _C3
        value = value * rest + _C2
        value = value * rest + _C1
        value = value * rest + _C0
        value = (value * (rest * rest) + rest) + _ONE
        mantissa_W[i], shift_W[i], nats_W[i] = np.int32(value * _MANTISSA), np.int32(-whole), np.int32(below * _NATS)
    return count


@njit(inline="always")
def _weigh(logits_V, first, top, bits, buffer_3W, weight_W):  # type: ignore[no-untyped-def]
    """Weights of a block; returns their sum and the block's spread."""
    mantissa_W, shift_W, nats_W = buffer_3W
    mass, spread = np.int64(0), np.int64(0)
    for i in range(_split(logits_V, first, top, mantissa_W, shift_W, nats_W)):
        mantissa, shift = np.int64(mantissa_W[i]), np.int64(shift_W[i])
        weight_W[i] = (mantissa << (bits - fixed_point.MANTISSA)) >> shift
        mass += weight_W[i]
        spread += (mantissa * np.int64(nats_W[i])) >> (shift + (_SPREAD - bits))
    return mass, spread


@compiled
def find(logits_TV, top_T, finite_T, points_TK, total_T, spread_T, heads_TH, ids_TK, low, bits):  # type: ignore[no-untyped-def]
    """See `search.search`; places that nothing is found for stay as they are."""
    tokens, vocab = logits_TV.shape
    mass_B = np.empty(-(-vocab // WIDTH), np.int64)
    buffer_3W, weight_W = np.empty((3, WIDTH), np.int32), np.zeros(WIDTH, np.int64)
    for t in range(tokens):
        if not finite_T[t]:
            continue
        logits_V, top = logits_TV[t], top_T[t]
        for block in range(len(mass_B)):
            mass_B[block], spread = _weigh(logits_V, block * WIDTH, top, bits, buffer_3W, weight_W)
            spread_T[t] += spread
        total = total_T[t] = mass_B.sum()
        least = total + 1
        if heads_TH.shape[1]:
            least, found = np.int64(np.ceil(low * np.float64(total))), 0
            for block in range(len(mass_B)):
                if mass_B[block] < least:
                    continue
                _weigh(logits_V, block * WIDTH, top, bits, buffer_3W, weight_W)
                for i in range(min(WIDTH, vocab - block * WIDTH)):
                    if weight_W[i] >= least:
                        heads_TH[t, found] = block * WIDTH + i
                        found += 1
                        mass_B[block] -= weight_W[i]
        block, filled, at, before, mass = 0, -1, 0, np.int64(0), np.int64(0)
        for k in range(points_TK.shape[1]):
            point = np.int64(points_TK[t, k] * np.float64(total))
            while block < len(mass_B) and before + mass_B[block] <= point:
                before += mass_B[block]
                block += 1
            if block == len(mass_B):
                break
            if block != filled:
                _weigh(logits_V, block * WIDTH, top, bits, buffer_3W, weight_W)
                for i in range(WIDTH):
                    weight_W[i] = weight_W[i] if weight_W[i] < least else 0
                filled, at, mass = block, 0, before + weight_W[0]
            # The block's mass ends after the point.
            while mass <= point:
                at += 1
                mass += weight_W[at]
            ids_TK[t, k] = block * WIDTH + at
