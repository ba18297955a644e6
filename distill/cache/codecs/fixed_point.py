"""Probabilities of ids as integers, so that sums of them depend neither on their order nor on the device.

An id's weight is floor(2 ** bits * exp(logit - greatest logit of the row)). The exponential is our own: the ones of
devices differ in the last bit, and a sum that moves by that much moves every boundary between ids after it. It is
2 ** -shift times a polynomial, each product and each sum rounded to fp32, which IEEE 754 fixes to the bit as long as no
product and sum are fused. Over all fp32 differences it is within 1e-7 of the exponential, and it never falls when a
logit rises.

Source of the coefficients: `expf` of the Cephes library.
"""

import torch
from torch import Tensor

LOG2_E = 1.4426950408889634
ROUND = 12582912.0
"""1.5 * 2**23: fp32 has no fractions up there, so adding and taking it away rounds to a whole number."""
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
"""Their sum is log 2; a shift times the first is exact."""
C5, C4, C3, C2, C1, C0 = (
    1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1,
)  # fmt: skip
LEAST = -36.0
"""What lies further below the greatest logit counts as this far: at no number of bits is its weight more than 0."""
MANTISSA, NATS = 24, 20
"""Bits of fraction of a mantissa and of a difference of logits."""


def fraction_bits(vocab_size: int) -> int:
    """Bits of a weight's fraction, so that a row's weights add up to less than 2 ** 62: 43 at V = 202,048."""
    return min(44, 61 - vocab_size.bit_length())


def _split(below: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(below) = mantissa * 2 ** -(MANTISSA + shift), and -below * 2 ** NATS; all int64.

    below: float32, at most 0; NaN counts as `LEAST`.
    """
    below = torch.where(below > LEAST, below, LEAST)
    whole = (below * LOG2_E + ROUND) - ROUND
    rest = (below - whole * LN2_HIGH) - whole * LN2_LOW
    value = rest * C5 + C4
    for coefficient in (C3, C2, C1, C0):
        value = value * rest + coefficient
    value = (value * (rest * rest) + rest) + 1.0
    return (value * 2.0**MANTISSA).long(), whole.neg().long(), (below * -(2.0**NATS)).long()


def weights(logits: Tensor, top: Tensor, bits: int) -> Tensor:
    """int64 weights of float32 logits; `top`, the greatest of each row, is broadcast."""
    mantissa, shift, _ = _split(logits - top)
    return (mantissa << (bits - MANTISSA)) >> shift


def weights_and_spread(logits_TV: Tensor, top_T1: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """`weights`, and the sum over each row of weight * (top - logit), int64 [T] with as many bits."""
    mantissa, shift, nats = _split(logits_TV - top_T1)
    spread_TV = (mantissa * nats) >> (shift + (MANTISSA + NATS - bits))
    return (mantissa << (bits - MANTISSA)) >> shift, spread_TV.sum(-1)


def least_head(total_T: Tensor, low: float) -> Tensor:
    """int64: the least weight that is `low` of the total."""
    return (low * total_T.double()).ceil().long()


def entropy(total_T: Tensor, spread_T: Tensor, bits: int) -> Tensor:
    """float32 nats [T], from a row's sum of weights and its spread; NaN where `total_T` is 0."""
    total_T = total_T.double()
    return (torch.log(total_T * 2.0**-bits) + spread_T / total_T).float()
