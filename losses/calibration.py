"""Expected calibration error: how far confidence is from accuracy."""

import torch
from torch import Tensor


def bin_confidence(confidence_T: Tensor, correct_T: Tensor, valid_T: Tensor, bins: int) -> Tensor:
    """[3, bins] fp64 sums over tokens: count, confidence, hits. Sums of batches and of ranks may be added.

    Args:
        confidence_T: probability of the most probable id, in [0, 1].
        correct_T: whether that id is the label.
        valid_T: bool, tokens that count; the others may hold NaN.
    """
    # Zeros, not a mask as an index, which waits for the device.
    confidence_T = torch.where(valid_T, confidence_T, 0.0)
    index_T = (confidence_T * bins).long().clamp(0, bins - 1)
    sums = torch.zeros(3, bins, dtype=torch.float64, device=confidence_T.device)
    for row, values_T in enumerate((valid_T, confidence_T, correct_T & valid_T)):
        sums[row].index_add_(0, index_T, values_T.double())
    return sums


def expected_calibration_error(sums: Tensor) -> Tensor:
    """Mean over tokens of |mean confidence - accuracy| of the token's bin, a share.

    Source: Guo et al. 2017, arXiv 1706.04599, equation 3.
    """
    count, confidence, hits = sums
    return (confidence - hits).abs().sum() / count.sum()
