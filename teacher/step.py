"""One pretraining step of the teacher: hard loss, and on the same forward pass the capture of its soft targets."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distill.config.schema import TrainConfig
from distill.data.join import Batch
from distill.engine.dist import Dist
from distill.tracking.meters import Meters
from losses import mixed_loss, routing_loss
from teacher.capture import Capture


class TeacherStep:
    """The teacher's half of the training loop's protocol: `begin`, `loss` per micro-batch, `end`, `state`.

    Targets are made before the teacher trains on the batch, so they are never memorised ones.
    """

    def __init__(self, meters: Meters, config: TrainConfig, capture: Capture | None):
        self.meters, self.config, self.capture = meters, config, capture

    def begin(self, batch: Batch, step: int, dist: Dist) -> None:
        self.step = step

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over valid tokens of hard and routing loss, and the expert counts [MoE layers, E] of this micro-batch."""
        labels_T, valid_T = batch.labels_BS.flatten(), batch.valid_BS.flatten()
        tap = None if self.capture is None else self.capture.begin(batch)
        parts = []

        def head(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
            out = mixed_loss(hidden_TD, weight_VD, labels_T, valid_T.float(), chunk=self.config.head_chunk, tap=tap)
            parts.append(out)
            return out.loss_sum

        loss_sum, routing = model(batch.ids_BS, batch.documents_BS, head)
        hard_T = parts[0].hard_T
        if self.capture is not None:
            self.capture.put(batch, hard_T, self.step)
        self.meters.add("loss", (hard_T * valid_T).sum(), valid_T.sum())
        penalty, sums = routing_loss(
            routing.logits_LTE,
            routing.experts_LTA,
            batch.valid_BS,
            balance=self.config.balance_loss,
            z=self.config.z_loss,
        )
        for name, value in sums.items():
            self.meters.add(name, value, valid_T.sum())
        return loss_sum + penalty, routing.counts_LE

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
