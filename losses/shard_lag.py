"""The lag factor of versions before 0.5, kept as a baseline of the laboratory: it depends on how a cache is cut."""

import math
from typing import Any

import torch
from torch import Tensor

from losses.factors import Stateless
from losses.weighting import Collective, Setting, Signals, State


class ShardLag(Stateless):
    """clip((student - shard) / (student - best), 0, 1) ** power: `shard` is the teacher's mean loss on the sample's
    shard, `best` the least of a shard read so far, `student` a running average over steps that begins at log V.

    In one process; of one corpus, or of several as if they were one text.
    """

    def __init__(self, setting: Setting, options: Any):
        """options: `power`, and `smoothing`, decay of the running average a step."""
        self.setting, self.power, self.smoothing = setting, options["power"], options["smoothing"]

    def init(self) -> State:
        student = torch.tensor([math.log(self.setting.vocab_size)], dtype=torch.float64, device=self.setting.device)
        return {"student": student, "best": torch.full_like(student, math.inf)}

    def observe(self, state: State, signals: Signals, total: Collective) -> State:
        shard_T = torch.nan_to_num(signals.shard_loss_T.double(), nan=math.inf)
        return state | {"best": torch.fmin(state["best"], shard_T.min())}

    def value(self, state: State, signals: Signals) -> Tensor:
        ahead = state["student"] - state["best"]
        ratio_T = (state["student"] - signals.shard_loss_T.double()) / ahead
        ratio_T = torch.where(ahead > 0, ratio_T.clamp(0.0, 1.0), 0.0)
        return torch.nan_to_num(ratio_T, nan=0.0).pow(self.power).float()

    def sums(self, state: State, signals: Signals) -> Tensor:
        known_T = signals.covered_T
        return torch.stack([(signals.student_loss_T * known_T).sum(), known_T.sum()]).double()

    def update(self, state: State, sums: Tensor) -> State:
        moved = self.smoothing * state["student"] + (1.0 - self.smoothing) * sums[0] / sums[1]
        return state | {"student": torch.where(moved.isnan(), state["student"], moved)}
