"""Rows like a language model's at V = 202,048, whose true distributions are known: the yardstick of the codecs.

The probability at rank r = 1, 2, ... is proportional to (r + q)^-s, with s uniform in [1.1, 4.0] and q in [0, 1]; the
id at rank r has the corpus rank that sorting log r + 1.5 x a standard normal gives. Mean entropy is about 1.84 nats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

VOCAB = 202_048
EXPONENTS = (1.1, 4.0)
"""The least and the largest s, before scaling."""


def rows(
    count: int, seed: int, block: int = 64, exponents: tuple[float, float] = EXPONENTS, vocab: int = VOCAB
) -> Iterator[Tensor]:
    """float64 probabilities [block, V] by id, an id being its corpus rank; the last block may be shorter."""
    g = torch.Generator().manual_seed(seed)
    rank_V = torch.arange(1, vocab + 1, dtype=torch.float64)
    for first in range(0, count, block):
        size = min(block, count - first)
        s_T1, q_T1 = torch.rand(2, size, 1, generator=g, dtype=torch.float64)
        s_T1 = exponents[0] + s_T1 * (exponents[1] - exponents[0])
        p_TV = ((rank_V + q_T1).log() * -s_T1).exp_()
        p_TV /= p_TV.sum(1, keepdim=True)
        place_TV = (rank_V.log().float() + 1.5 * torch.randn(size, vocab, generator=g)).argsort(1)
        # place_TV[t, c]: which probability rank has the corpus rank c.
        yield p_TV.gather(1, place_TV)


def scaled(vocab: int, entropy: float) -> tuple[float, float]:
    """EXPONENTS times the factor that gives rows of this mean entropy, in nats."""
    g = torch.Generator().manual_seed(0)
    spread_T1, q_T1 = torch.rand(2, 64, 1, generator=g, dtype=torch.float64)
    log_rank_TV = (torch.arange(1, vocab + 1, dtype=torch.float64) + q_T1).log()
    s_T1 = EXPONENTS[0] + spread_T1 * (EXPONENTS[1] - EXPONENTS[0])

    def mean_entropy(scale: float) -> float:
        logp_TV: Tensor = (log_rank_TV * (-scale * s_T1)).log_softmax(-1)
        return float(-(logp_TV.exp() * logp_TV).sum(1).mean())

    low, high = 1e-3, 100.0
    for _ in range(20):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if mean_entropy(middle) > entropy else (low, middle)
    return low * EXPONENTS[0], low * EXPONENTS[1]
