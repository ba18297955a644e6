"""One pretraining step of the teacher: hard loss, and on the same forward pass the capture of its soft targets."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distill.data.join import Batch
from distill.engine.dist import Dist
from distill.model.transformer import Routing
from distill.tracking.meters import Meters
from losses import mixed_loss
from teacher.capture import Capture


class TeacherStep:
    """The teacher's half of the training loop's protocol: `begin`, `loss` per micro-batch, `end`, `state`.

    Targets are made before the teacher trains on the batch, so they are never memorised ones.
    """

    def __init__(self, meters: Meters, head_chunk: int, capture: Capture | None):
        self.meters, self.head_chunk, self.capture = meters, head_chunk, capture

    def begin(self, batch: Batch, step: int, dist: Dist) -> None:
        self.step = step

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, Routing]:
        """Sum over valid tokens of the hard loss, and what the routers did with this micro-batch."""
        labels_T, valid_T = batch.labels_BS.flatten(), batch.valid_BS.flatten()
        tap = None if self.capture is None else self.capture.begin(batch)
        parts = []

        def head(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
            out = mixed_loss(hidden_TD, weight_VD, labels_T, valid_T.float(), chunk=self.head_chunk, tap=tap)
            parts.append(out)
            return out.loss_sum

        loss_sum, routing = model(batch.ids_BS, batch.documents_BS, head, batch.images)
        hard_T = parts[0].hard_T
        if self.capture is not None:
            self.capture.put(batch, hard_T, self.step)
        self.meters.add("loss", (hard_T * valid_T).sum(), valid_T.sum())
        return loss_sum, routing

    def end(self, dist: Dist) -> None:
        pass

    def figures(self) -> dict[str, float]:
        """Of this process's capture since it started: bytes per published token, seconds a step, samples left out."""
        return {} if self.capture is None else self.capture.figures()

    def state(self) -> dict[str, Any]:
        """Nothing: all that a resumed teacher needs is its weights and its place in the stream."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        assert not state, state

    def hand_over(self) -> dict[str, Tensor]:
        return {} if self.capture is None else self.capture.hand_over()

    def take_back(self, tensors: dict[str, Tensor]) -> None:
        if self.capture is not None:
            self.capture.take_back(tensors)
