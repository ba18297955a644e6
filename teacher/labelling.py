"""Labelling by a frozen teacher: a forward pass from which targets are selected; no gradient, optimizer or engine."""

from typing import Protocol

import torch
from torch import Tensor, nn

from distill.data.join import Batch
from distill.model.count import flops_per_token
from distill.model.transformer import Transformer
from losses import HeadLoss, Mixed, fixed, head_loss
from losses.mixed import Select
from teacher.capture import Capture, MicroTargets


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

    def hidden(self, batch: Batch) -> Tensor:
        """Normed hidden states [T, E] of every token.

        Raises:
            ConfigError: the logits are not their product with `unembedding`.
        """
        ...

    @property
    def unembedding(self) -> Tensor:
        """[V, E]; ConfigError as `hidden`."""
        ...

    def label(self, batch: Batch, select: Select | None, head_chunk: int | None) -> MicroTargets:
        """Selects from the logits of every token, at most `head_chunk` (None: by bytes) at a time and in order.

        select: None: nothing is selected.
        """
        ...


class Own:
    """A Transformer of ours as a frozen teacher."""

    def __init__(self, model: Transformer):
        self.model: Transformer = model.eval()
        self.vocab_size = model.config.vocab_size

    def flops_per_token(self, sample_tokens: int, tiles: float) -> float:
        return flops_per_token(self.model.config, sample_tokens, tiles)

    def hidden(self, batch: Batch) -> Tensor:
        return own_hidden(self.model, batch)

    @property
    def unembedding(self) -> Tensor:
        return self.model.head.weight

    def label(self, batch: Batch, select: Select | None, head_chunk: int | None) -> MicroTargets:
        def head_fn(hidden_TD: Tensor, weight_VD: Tensor) -> HeadLoss:
            return label_rows(hidden_TD, weight_VD, batch, select, head_chunk)

        head, _ = self.model(batch.ids_BS, batch.documents_BS, head_fn, batch.images)
        return MicroTargets(batch, head.parts["hard"], head.selected)


@torch.no_grad()
def own_hidden(model: Transformer, batch: Batch) -> Tensor:
    """Normed hidden states [T, E] of a model of ours in evaluation mode, whatever mode it is in."""
    training = model.training
    model.eval()
    hidden_TE: Tensor = model(batch.ids_BS, batch.documents_BS, None, batch.images)[0]
    model.train(training)
    return hidden_TE


def label_rows(
    hidden_TD: Tensor, weight_VD: Tensor, batch: Batch, select: Select | None, chunk: int | None
) -> HeadLoss:
    """The head's pass over chunks; its part `hard` is the cross entropy against the labels, nats."""
    labels_T = batch.labels_BS.flatten()
    no_weight_T = torch.zeros(len(labels_T), device=labels_T.device)
    return head_loss(hidden_TD, weight_VD, Mixed(labels_T, fixed(no_weight_T), select=select), chunk=chunk)


@torch.inference_mode()
def label(
    teacher: Frozen, batch: Batch, head_chunk: int | None, capture: Capture | None = None, step: int = 0
) -> Tensor:
    """Labels a batch on the teacher's device and hands its targets to the writers of the capture, if there is one.

    Args:
        step: of the teacher, for the records.

    Returns:
        Sum of the label losses over valid tokens (nats) and their number, fp64 [2] on the device; nothing waits for it.
    """
    targets = teacher.label(batch, None if capture is None else capture.selector(batch), head_chunk)
    if capture is not None:
        capture.put(targets, step)
    valid_T = batch.valid_BS.flatten()
    return torch.stack([torch.where(valid_T, targets.hard_T.double(), 0.0).sum(), valid_T.sum().double()])
