"""A frozen teacher labels a batch: the forward pass and its tap, no gradient, no optimizer, no engine."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from distill.data.join import Batch
from distill.model.count import flops_per_token
from distill.model.transformer import Transformer
from losses import mixed_loss
from losses.mixed import Tap
from teacher.capture import Capture


class Frozen(Protocol):
    """A teacher that does not train: one of ours, or one of `transformers` (teacher/foreign.py)."""

    @property
    def vocab_size(self) -> int:
        """V, the width of its logits."""
        ...

    @property
    def model(self) -> nn.Module: ...

    def flops_per_token(self, sample_tokens: int, tiles: float) -> float:
        """Of a forward pass over samples of S tokens, with so many tiles of images in the mean."""
        ...

    def label(self, batch: Batch, tap: Tap, head_chunk: int) -> Tensor:
        """Shows the probabilities of every token to the tap, at most `head_chunk` at a time and in order.

        Returns the cross entropy against the labels, hard_T, nats.
        """
        ...


class Own:
    """A Transformer of ours as a frozen teacher."""

    def __init__(self, model: Transformer):
        self.model: Transformer = model.eval()
        self.vocab_size = model.config.vocab_size

    def flops_per_token(self, sample_tokens: int, tiles: float) -> float:
        return flops_per_token(self.model.config, sample_tokens, tiles)

    def label(self, batch: Batch, tap: Tap, head_chunk: int) -> Tensor:
        def head(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
            return hard_loss(hidden_TD, weight_VD, batch, tap, head_chunk)

        hard_T, _ = self.model(batch.ids_BS, batch.documents_BS, head, batch.images)
        return hard_T


def hard_loss(hidden_TD: Tensor, weight_VD: Tensor, batch: Batch, tap: Tap, chunk: int) -> Tensor:
    """Cross entropy against the labels, hard_T in nats, by the head's pass over chunks that the tap looks into."""
    labels_T = batch.labels_BS.flatten()
    no_weight_T = torch.zeros(len(labels_T), device=labels_T.device)
    return mixed_loss(hidden_TD, weight_VD, labels_T, no_weight_T, chunk=chunk, tap=tap).hard_T


@torch.inference_mode()
def label(
    teacher: Frozen, batch: Batch, capture: Capture, step: int, tokens_seen: int, head_chunk: int
) -> tuple[Tensor, Tensor]:
    """Labels a batch on the teacher's device and hands its targets to the writers.

    Args:
        step, tokens_seen: of the teacher, as the records will say.

    Returns:
        Sum of the label losses over valid tokens (nats) and their number; on the device, nothing waits for it.
    """
    hard_T = teacher.label(batch, capture.begin(batch), head_chunk)
    capture.put(batch, hard_T, step, tokens_seen)
    valid_T = batch.valid_BS.flatten()
    return (hard_T.double() * valid_T).sum(), valid_T.sum()


@torch.inference_mode()
def label_loss(teacher: Frozen, batch: Batch, head_chunk: int) -> tuple[float, int]:
    """Sum of the label losses over the valid tokens of a batch (nats), and their number; nothing is kept."""
    valid_T = batch.valid_BS.flatten()
    hard_T = teacher.label(batch, lambda start, logits_TV, lse_T: None, head_chunk)
    return float((hard_T.double() * valid_T).sum()), int(valid_T.sum())
