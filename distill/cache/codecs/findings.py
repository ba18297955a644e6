"""What a search of rows of logits finds."""

from typing import NamedTuple

from torch import Tensor

from distill.cache.codecs import fixed_point


class Findings(NamedTuple):
    """Of T rows of logits."""

    entropy_T: Tensor
    """float32 nats; NaN for a row that is not finite."""
    top_T: Tensor
    """float32, the greatest logit."""
    total_T: Tensor
    """int64, the sum of all weights; 0 for a row that is not finite."""
    heads_TH: Tensor
    """int32: ids whose share of the mass is at least `low`; -1 where there are no more."""
    ids_TK: Tensor
    """int32: the id at each point; -1 where the mass ends before."""


def share(logits_TK: Tensor, found: Findings, vocab_size: int) -> Tensor:
    """float64 [T, K]: what share of the mass of their rows some logits have; NaN where a row is not finite."""
    weights_TK = fixed_point.weights(logits_TK, found.top_T[:, None], fixed_point.fraction_bits(vocab_size))
    return weights_TK / found.total_T.double()[:, None]
