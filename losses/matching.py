"""Matching of hidden states: how far a projection of the student's points from the teacher's."""

import torch.nn.functional as F
from torch import Tensor


def hidden_match(projected_TE: Tensor, teacher_TE: Tensor) -> Tensor:
    """1 - cosine of projected student and teacher, [T] in [0, 2], in at least fp32; the teacher gets no gradient.

    Scale-free, so that one coefficient fits teachers of any width and norm. Sources: the learned projection of TinyBERT
    (arXiv 1909.10351) and Minitron (2407.14679), the cosine of DistilBERT (1910.01108).
    """
    return 1.0 - F.cosine_similarity(_wide(projected_TE), _wide(teacher_TE.detach()), dim=-1)


def _wide(x_TE: Tensor) -> Tensor:
    return x_TE.float() if x_TE.dtype.itemsize < 4 else x_TE
