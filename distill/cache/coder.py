"""The entropy coder of records: adaptive 32-symbol models and a range coder, compiled.

Bit for bit what docs/cache.md says under "Record". A record depends on its own sample only: every model starts uniform
and learns as it goes. Compiled by numba without the GIL, so that writer and reader threads do not hold training up; the
first use on a machine takes some seconds, later ones load the compiled code.
"""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from distill.cache.jit import compiled

Array = NDArray[Any]

SYMBOLS = 32
BITS = 15
"""Probabilities are multiples of 2**-15, at least one each."""
COUNT, ENTROPY, LABEL, GAP, VALUE, AHEAD, REST, MODELS = 0, 1, 17, 49, 75, 101, 110, 111
"""First model of each kind."""
SAMPLE_BYTES, TOKEN_BYTES, ATOM_BYTES = 16, 16, 12
"""Upper bounds of the bytes of a sample's end, of a token without its atoms, and of an atom."""


def fresh() -> NDArray[np.int32]:
    """All models as a sample begins: mass below each symbol, and in column 32 how often the model was used."""
    models = np.zeros((MODELS, SYMBOLS + 1), np.int32)
    models[:, :SYMBOLS] = np.arange(SYMBOLS) << (BITS - 5)
    return models


@njit(inline="always")
def _length(value):
    """Bits of a non-negative number below 2**32."""
    bits = 0
    if value >> 16:
        bits += 16
        value >>= 16
    if value >> 8:
        bits += 8
        value >>= 8
    if value >> 4:
        bits += 4
        value >>= 4
    if value >> 2:
        bits += 2
        value >>= 2
    if value >> 1:
        bits += 1
        value >>= 1
    return bits + value


@njit(inline="always")
def _learn(model, symbol):
    """Moves every boundary towards `symbol` having all but the others' least share: fast at first, then slower."""
    rate = min(2 + _length(model[SYMBOLS] >> 2), 7)
    model[SYMBOLS] += 1
    for i in range(1, SYMBOLS):
        target = i if i <= symbol else (1 << BITS) - SYMBOLS + i
        model[i] += (target - model[i]) >> rate


@njit(inline="always")
def _put(out, at, low, width, model, symbol):
    """Range coder, one step: `out[:at]` is written, [low, low + width) is what is left of 2**32."""
    unit = width >> BITS
    start = np.int64(model[symbol])
    end = np.int64(model[symbol + 1]) if symbol < SYMBOLS - 1 else 1 << BITS
    low += unit * start
    width = unit * (end - start)
    if low >> 32:
        low = _carry(out, at, low)
    while width < 1 << 24:
        out[at] = low >> 24
        at += 1
        low = (low << 8) & 0xFFFFFFFF
        width <<= 8
    _learn(model, symbol)
    return at, low, width


@njit
def _carry(out, at, low):
    back = at - 1
    while out[back] == 255:
        out[back] = 0
        back -= 1
    out[back] += 1
    return low & 0xFFFFFFFF


@njit(inline="always")
def _raw(raw, bit, value, bits):
    """Appends the low `bits` of `value`, least significant first, to bytes that are zero from bit `bit` on."""
    while bits > 0:
        room = 8 - (bit & 7)
        take = min(room, bits)
        raw[bit >> 3] |= (value & ((1 << take) - 1)) << (bit & 7)
        value >>= take
        bit += take
        bits -= take
    return bit


@njit(inline="always")
def _put_number(out, at, low, width, raw, bit, model, value):
    if value < 8:
        at, low, width = _put(out, at, low, width, model, value)
    else:
        bits = _length(value)
        at, low, width = _put(out, at, low, width, model, bits + 4)
        bit = _raw(raw, bit, value, bits - 1)
    return at, low, width, bit


@njit(inline="always")
def _put_byte(out, at, low, width, raw, bit, model, value):
    at, low, width = _put(out, at, low, width, model, value >> 3)
    return at, low, width, _raw(raw, bit, value, 3)


@njit
def _finish(out, at, low, width, raw, bit):
    """Ends a record: the fewest bytes that fix a number in [low, low + width) whatever follows, then the raw bits."""
    shift = 24
    while True:
        free = (np.int64(1) << shift) - 1
        value = (low + free) & ~free
        if value + free < low + width:
            break
        shift -= 8
    if value >> 32:
        value = _carry(out, at, value)
    for place in range(24, shift - 1, -8):
        out[at] = (value >> place) & 255
        at += 1
    size = (bit + 7) >> 3
    for i in range(size):
        out[at + i] = raw[size - 1 - i]
        raw[size - 1 - i] = 0
    return at + size


@compiled
def encode(
    valid_T, label_T, entropy_T, counts_T, ids_N, codes_N, rest_T, rank_of_id, implied, sample_tokens, models0, out, raw
):
    """Codes n samples, one after the other, into `out`; returns the end of each, and the atoms that each keeps.

    implied: the codes of a token have a known sum, so that its largest need not be stored. out, raw: scratch for all
    samples and for the largest (see the three sizes above); `raw` is zeros and is left so. -1 as the first end: an id
    twice among the atoms of a token.
    """
    samples = len(valid_T) // sample_tokens
    ends, kept = np.zeros(samples, np.int64), np.zeros(samples, np.int64)
    most = 1
    for t in range(len(counts_T)):
        most = max(most, counts_T[t])
    ranks, values = np.empty(most, np.int64), np.empty(most, np.int64)
    first, at = 0, 0
    for sample in range(samples):
        models = models0.copy()
        low, width, bit = np.int64(0), np.int64(0xFFFFFFFF), 0
        for t in range(sample * sample_tokens, (sample + 1) * sample_tokens):
            atoms = counts_T[t]
            number = atoms + 1 if valid_T[t] else 0
            at, low, width, bit = _put_number(out, at, low, width, raw, bit, models[COUNT], number)
            if not valid_T[t]:
                first += atoms
                continue
            entropy, label = np.int64(entropy_T[t]), np.int64(label_T[t])
            at, low, width, bit = _put_byte(out, at, low, width, raw, bit, models[ENTROPY + min(atoms, 15)], entropy)
            at, low, width, bit = _put_byte(out, at, low, width, raw, bit, models[LABEL + (entropy >> 3)], label)
            if len(rest_T):
                at, low, width, bit = _put_byte(out, at, low, width, raw, bit, models[REST], np.int64(rest_T[t]))
            for i in range(atoms):  # insertion sort: a token has few
                rank, value, j = np.int64(rank_of_id[ids_N[first + i]]), np.int64(codes_N[first + i]), i
                while j > 0 and ranks[j - 1] > rank:
                    ranks[j], values[j] = ranks[j - 1], values[j - 1]
                    j -= 1
                ranks[j], values[j] = rank, value
            first += atoms
            kept[sample] += atoms
            ahead = implied and atoms > 0
            if ahead:
                values[np.argmax(values[:atoms])] = 0
            last = np.int64(-1)
            for i in range(atoms):
                rank = ranks[i]
                if rank <= last:
                    ends[0] = -1
                    return ends, kept
                model = models[GAP + _length(last + 1)]
                at, low, width, bit = _put_number(out, at, low, width, raw, bit, model, rank - last - 1)
                model = models[AHEAD + min(atoms - i, 8)] if ahead else models[VALUE + _length(rank + 1)]
                at, low, width, bit = _put_number(out, at, low, width, raw, bit, model, values[i])
                if values[i] == 0:
                    ahead = False
                last = rank
        at = _finish(out, at, low, width, raw, bit)
        ends[sample] = at
    return ends, kept


@njit(inline="always")
def _get(data, at, end, code, width, model):
    unit = width >> BITS
    goal = code // unit
    symbol = 0
    for i in range(1, SYMBOLS):
        symbol += model[i] <= goal
    start = np.int64(model[symbol])
    stop = np.int64(model[symbol + 1]) if symbol < SYMBOLS - 1 else 1 << BITS
    code -= unit * start
    width = unit * (stop - start)
    while width < 1 << 24:
        code = (code << 8) & 0xFFFFFFFF
        if at < end:
            code |= data[at]
        at += 1
        width <<= 8
    _learn(model, symbol)
    return symbol, at, code, width


@njit(inline="always")
def _get_raw(data, begin, end, bit, bits):
    value, have = np.int64(0), 0
    while bits > 0:
        take = min(8 - (bit & 7), bits)
        place = end - 1 - (bit >> 3)
        byte = np.int64(data[place]) if place >= begin else np.int64(0)
        value |= ((byte >> (bit & 7)) & ((1 << take) - 1)) << have
        have += take
        bit += take
        bits -= take
    return value, bit


@njit(inline="always")
def _get_number(data, begin, at, end, code, width, bit, model):
    symbol, at, code, width = _get(data, at, end, code, width, model)
    value = np.int64(symbol)
    if symbol >= 8:
        bits = symbol - 5
        value, bit = _get_raw(data, begin, end, bit, bits)
        value |= np.int64(1) << bits
    return value, at, code, width, bit


@njit(inline="always")
def _get_byte(data, begin, at, end, code, width, bit, model):
    symbol, at, code, width = _get(data, at, end, code, width, model)
    low, bit = _get_raw(data, begin, end, bit, 3)
    return (np.int64(symbol) << 3) | low, at, code, width, bit


@compiled
def decode(
    data, starts, ends, atoms_B, ids_by_rank, total, max_code, max_atoms, has_rest, sample_tokens, models0,
    valid_T, label_T, entropy_T, counts_T, ids_N, codes_N, rest_T
):  # fmt: skip
    """Inverse of `encode` for B samples at [start, end) of `data`, into arrays of T = B * S tokens, N = sum(atoms_B).

    total: of the codes of a token, one of which is implied; 0: none is. max_code, max_atoms: the largest code, and most
    atoms of a token, that there are. Returns the first sample that is not what `encode` writes, or -1: whatever the
    bytes, nothing outside of the arrays is touched.
    """
    first = 0
    for sample in range(len(starts)):
        models = models0.copy()
        begin, end, bit = starts[sample], ends[sample], 0
        at, code, width = begin, np.int64(0), np.int64(0xFFFFFFFF)
        for _ in range(4):
            code = (code << 8) | (np.int64(data[at]) if at < end else np.int64(0))
            at += 1
        stop = first + atoms_B[sample]
        for t in range(sample * sample_tokens, (sample + 1) * sample_tokens):
            number, at, code, width, bit = _get_number(data, begin, at, end, code, width, bit, models[COUNT])
            valid_T[t] = number > 0
            if number == 0:
                continue
            atoms = number - 1
            if atoms > stop - first or atoms > max_atoms:
                return sample
            counts_T[t] = atoms
            model = models[ENTROPY + min(atoms, 15)]
            entropy, at, code, width, bit = _get_byte(data, begin, at, end, code, width, bit, model)
            model = models[LABEL + (entropy >> 3)]
            label, at, code, width, bit = _get_byte(data, begin, at, end, code, width, bit, model)
            entropy_T[t], label_T[t] = entropy, label
            if has_rest:
                rest_T[t], at, code, width, bit = _get_byte(data, begin, at, end, code, width, bit, models[REST])
            ahead, left, implied = total > 0, np.int64(total), -1
            last = np.int64(-1)
            for i in range(atoms):
                model = models[GAP + _length(last + 1)]
                gap, at, code, width, bit = _get_number(data, begin, at, end, code, width, bit, model)
                last += gap + 1
                if last >= len(ids_by_rank):
                    return sample
                ids_N[first + i] = ids_by_rank[last]
                model = models[AHEAD + min(atoms - i, 8)] if ahead else models[VALUE + _length(last + 1)]
                value, at, code, width, bit = _get_number(data, begin, at, end, code, width, bit, model)
                if value > max_code:
                    return sample
                codes_N[first + i] = value
                left -= value
                if value == 0 and total > 0:
                    if not ahead:
                        return sample
                    ahead, implied = False, first + i
            if total > 0 and atoms > 0:
                if ahead or left < 1:
                    return sample
                codes_N[implied] = left
            first += atoms
        if first != stop:
            return sample
    return -1


@compiled
def pad(counts_T, ids_N, probs_N, ids_TK, probs_TK):
    """Spreads runs of atoms over rows of zeros."""
    first = 0
    for t in range(len(counts_T)):
        for i in range(counts_T[t]):
            ids_TK[t, i] = ids_N[first + i]
            probs_TK[t, i] = probs_N[first + i]
        first += counts_T[t]
