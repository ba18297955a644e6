"""Random numbers as a function of where they are used, so that no order of work can change a record.

A number is a hash of (seed, sample id, position, draw): the generator splitmix64 (Steele, Lea and Flood, OOPSLA 2014)
with a state made by its own finalizer from the first three, asked for its draw-th number; in the wrapping int64
arithmetic of torch, which is the same on every device.
"""

from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MUL_1 = 0xBF58476D1CE4E5B9 - 2**64
_MUL_2 = 0x94D049BB133111EB - 2**64


def _shift(bits: Tensor, count: int) -> Tensor:
    """Logical right shift; int64's own copies the sign."""
    return (bits >> count).bitwise_and_((1 << (64 - count)) - 1)


def mix(bits: Tensor) -> Tensor:
    """The finalizer of splitmix64: every bit of the input moves about half of the output's bits."""
    bits = _shift(bits, 30).bitwise_xor_(bits).mul_(_MUL_1)
    bits = _shift(bits, 27).bitwise_xor_(bits).mul_(_MUL_2)
    return _shift(bits, 31).bitwise_xor_(bits)


def _mixed(bits: int) -> int:
    """`mix` of one number, as a signed one."""
    bits = ((bits >> 30) ^ bits) * _MUL_1 % 2**64
    bits = ((bits >> 27) ^ bits) * _MUL_2 % 2**64
    bits = (bits >> 31) ^ bits
    return bits - 2**64 if bits >= 2**63 else bits


def token_keys(seed: int, sample_ids_T: Tensor, positions_T: Tensor) -> Tensor:
    """One int64 key for each token; equal for equal (seed, sample id, position) and otherwise unrelated."""
    start = _mixed(seed % 2**63)
    return mix(mix(sample_ids_T.long() * GOLDEN + start) + positions_T.long() * GOLDEN)


def uniforms(keys: Tensor, draws: Tensor | int) -> Tensor:
    """float64 in [0, 1), 53 bits, for each pair of key and draw index >= 0 (broadcast against each other)."""
    return _shift(mix(keys + (draws + 1) * GOLDEN), 11).double().mul_(2.0**-53)
