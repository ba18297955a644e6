"""The teacher's recipe: the hard loss, and the capture of soft targets from the same forward pass."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from distill.data.join import Batch
from distill.engine.recipe import Forward, Recipe
from losses import Mixed, RowFunction, fixed, head_loss
from losses.checked import Checked
from losses.weighting import Mean
from teacher.capture import Capture, MicroTargets


class TeacherRecipe(Recipe):
    """Selects the targets of a batch before the teacher trains on it, so that none of them is memorized.

    A recipe without state: a resumed teacher needs its weights and its place in the stream alone.

    Args:
        head_chunk: tokens whose logits live at one time; None: by bytes.
        debug: labels and weights are checked.
    """

    def __init__(self, head_chunk: int | None, capture: Capture | None, debug: bool = False):
        self.head_chunk, self.capture, self.debug = head_chunk, capture, debug

    def forward(self, model: Any, micro: Batch, step: int) -> Forward:
        """Sum over valid tokens of the hard loss; the result is the micro-batch's targets, if they are captured."""
        labels_T, valid_T = micro.labels_BS.flatten(), micro.valid_BS.flatten()
        select = None if self.capture is None else self.capture.selector(micro)
        rows: RowFunction = Mixed(labels_T, fixed(valid_T.float()), select=select)
        head_fn = partial(head_loss, row_function=Checked(rows) if self.debug else rows, chunk=self.head_chunk)
        head, routing = model(micro.ids_BS, micro.documents_BS, head_fn, micro.images)
        hard_T = head.parts["hard"]
        means = {"loss": Mean(torch.where(valid_T, hard_T, 0.0).sum(), valid_T.sum())}
        targets = None if self.capture is None else MicroTargets(micro, hard_T, head.selected)
        return Forward(head.loss_sum, routing, means, result=targets)

    def end(self, step: int, results: list[MicroTargets]) -> None:
        if self.capture is not None:
            for targets in results:
                self.capture.put(targets, step)

    def publish(self, last: bool) -> None:
        """Everything that was captured; `last`: nothing more will come."""
        if self.capture is not None:
            (self.capture.finish if last else self.capture.flush)()

    def metrics(self) -> dict[str, float]:
        """Of this process's capture since it started: bytes per published token, seconds a micro-batch, samples left
        out."""
        return {} if self.capture is None else self.capture.metrics()

    def hand_over(self) -> dict[str, Tensor]:
        return {} if self.capture is None else self.capture.hand_over()

    def take_back(self, tensors: dict[str, Tensor]) -> None:
        if self.capture is not None:
            self.capture.take_back(tensors)
