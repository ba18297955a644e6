"""The one training loop: teacher and student differ in their step, not here.

A trainer stands at a step; `advance` brings it to another. Everything that it does at step s follows from (seed, s) and
its explicit state, so a run may be cut at any checkpoint and go on as if nothing had happened.

A loss, gradient norm or weight that is not finite ends the run: noted on the device at every step, read when metrics
flush, before a held-out evaluation and at the end of `advance`, before whoever called it saves, publishes or evaluates.
The update itself is made, or left out by DeepSpeed's stage 1: what counts is the last checkpoint.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from distill.config.errors import DivergenceError
from distill.config.schema import Freeze, OptimConfig, TrainConfig
from distill.config.stop import Stopped
from distill.data.join import Batch, Joiner
from distill.data.prefetch import Prefetch
from distill.data.stream import Stream
from distill.engine.dist import Dist
from distill.engine.halt import Halt
from distill.engine.optim import learning_rate
from distill.engine.watch import Watch
from distill.engine.zero import Engine
from distill.model.balance import load_stats, update_bias
from distill.model.transformer import Routing
from distill.tracking.meters import Meters
from distill.tracking.tracker import Tracker
from losses import routing_loss

Positions = Callable[[np.ndarray], np.ndarray]


class Step(Protocol):
    """What teacher and student put into the loop; `begin` and `end` may be collective, `loss` is not.

    `figures` adds what the host knows to a logged row. `hand_over` takes away what this rank has begun and not yet
    published, for `take_back` after a resume.
    """

    meters: Meters

    def begin(self, batch: Batch, step: int, dist: Dist) -> None: ...
    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, Routing]: ...
    def end(self, dist: Dist) -> None: ...
    def figures(self) -> dict[str, float]: ...
    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: dict[str, Any]) -> None: ...
    def hand_over(self) -> dict[str, Tensor]: ...
    def take_back(self, tensors: dict[str, Tensor]) -> None: ...


class Trainer:
    """One model in training.

    Args:
        role: `job` of its rows in metrics.jsonl.
        positions: maps the trainer's own order 0, 1, 2, ... to positions of the stream (replay).
        held_out: evaluates the model on held-out text and returns what a row says of it.
        watch: notes every step of this model.
        diverged: makes the error that ends the run, of what was not finite.
    """

    def __init__(
        self,
        role: str,
        engine: Engine,
        step: Step,
        config: TrainConfig,
        optim: OptimConfig,
        steps: int,
        stream: Stream,
        positions: Positions,
        joiner: Joiner,
        sample_tokens: int,
        tracker: Tracker,
        dist: Dist,
        held_out: Callable[[Any], dict[str, float]],
        watch: Watch,
        diverged: Callable[[str], DivergenceError],
    ):
        self.role, self.engine, self.program, self.config, self.optim = role, engine, step, config, optim
        self.steps, self.stream, self.positions, self.joiner = steps, stream, positions, joiner
        self.tracker, self.dist, self.held_out = tracker, dist, held_out
        self.watch, self.diverged = watch, diverged
        self.at = 0
        self.halt = Halt(dist)
        self.stopped = False
        """SIGTERM has ended `advance` before its goal: save, and end."""
        self.sample_tokens = sample_tokens
        self._window = [0.0, 0.0, 0]  # seconds, those waiting for a batch, and tokens since the last logged row
        self.seconds = self.stalled = 0.0
        """In `advance`, and of that waiting for a batch; of this process."""

    def state(self) -> dict[str, Any]:
        return {"step": self.at, "program": self.program.state(), "views": self.joiner.views}

    def load_state(self, state: dict[str, Any]) -> None:
        self.at = state["step"]
        self.program.load_state(state["program"])

    def hand_over(self) -> dict[str, Tensor]:
        """What this rank has of an interval that is not over: sums for the next row, and what the step has begun."""
        sums = {f"sums/{key}": slot for key, slot in self.program.meters.state().items()}
        return sums | {f"step/{key}": tensor for key, tensor in self.program.hand_over().items()}

    def take_back(self, tensors: dict[str, Tensor]) -> None:
        parts: dict[str, dict[str, Tensor]] = {"sums": {}, "step": {}}
        for key, tensor in tensors.items():
            part, name = key.split("/", 1)
            parts[part][name] = tensor
        self.program.meters.load_state(parts["sums"])
        self.program.take_back(parts["step"])

    def advance(self, stop: int) -> None:
        """Trains up to step `stop`; after SIGTERM up to the end of the step that is being made, and `stopped` is set.

        Raises:
            DivergenceError: on every rank, if anything was not finite on the way.
            Stopped: after the step that is being made, on Ctrl-C.
        """
        assert stop <= self.steps, (stop, self.steps)
        with Prefetch(self.batch, self.at, stop) as batches:
            began, waited = time.perf_counter(), 0.0
            for batch in batches:
                self._one(batch)
                seconds, stalled = time.perf_counter() - began, batches.waited - waited
                self.seconds += seconds
                self.stalled += stalled
                self._window[0] += seconds
                self._window[1] += stalled
                self._window[2] += self.config.batch * self.sample_tokens
                self._report(stop)
                if (asked := self.halt.asked()) is signal.SIGINT:
                    raise Stopped(asked)
                if asked is not None:
                    self.stopped = True
                    return
                began, waited = time.perf_counter(), batches.waited

    def check(self) -> None:
        """Raises DivergenceError, on every rank, if anything was not finite so far; waits for the device."""
        if (problem := self.watch.problem()) is not None:
            raise self.diverged(problem)

    def batch(self, step: int) -> Batch:
        """This rank's rows of optimizer step `step`."""
        share = self.config.batch // self.dist.world
        first = step * self.config.batch + self.dist.rank * share
        corpus_B, sample_ids_B = self.stream.at(self.positions(np.arange(first, first + share)))
        return self.joiner.batch(corpus_B, sample_ids_B)

    def rehearse(self, batch: Batch) -> None:
        """A step in all but effect, for timing: at learning rate 0 and without moving on."""
        self._update(batch, lr=0.0)

    def _one(self, batch: Batch) -> None:
        lr = learning_rate(self.optim, self.at, self.steps)
        norm, counts_LE, finite = self._update(batch, lr)
        if self.config.balance_rate > 0 and self.config.freeze is not Freeze.text:
            update_bias(self.engine.model, counts_LE, self.config.balance_rate)
        self.program.end(self.dist)
        self.at += 1
        self.watch.see(self.at, finite, norm.isfinite(), self.engine.weights_finite())
        meters = self.program.meters
        meters.add("grad_norm", norm, 1.0)
        meters.add("lr", lr, 1.0)
        for name, value in load_stats(counts_LE).items():
            meters.add(name, value, 1.0)

    def _update(self, batch: Batch, lr: float) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient norm, tokens per expert of each MoE layer, and whether the losses of all ranks are finite."""
        valid = self.halt.sum(batch.valid_BS.sum())
        self.program.begin(batch, self.at, self.dist)
        counts: list[Tensor] = []
        broken = torch.zeros((), dtype=torch.int64, device=self.dist.device)
        micro = batch.ids_BS.shape[0] // self.config.accumulation

        def forward(start: int) -> Callable[[Any], Tensor]:
            def loss(model: Any) -> Tensor:
                rows = batch.rows(start, start + micro).to(self.dist.device)
                loss_sum, routing = self.program.loss(model, rows)
                counts.append(routing.counts_LE)
                loss_sum = loss_sum + self._penalty(routing, rows.valid_BS)
                broken.add_(loss_sum.detach().isfinite().logical_not())
                return loss_sum

            return loss

        norm = self.engine.step((forward(i * micro) for i in range(self.config.accumulation)), valid, lr)
        counts_LE = torch.stack(counts).sum(0)
        # One sum over ranks for both: a rank must not publish what another's loss has spoiled.
        sums = self.dist.sum(torch.cat([counts_LE.flatten(), broken[None]]))
        return norm, sums[:-1].view_as(counts_LE), sums[-1] == 0

    def _penalty(self, routing: Routing, valid_BS: Tensor) -> Tensor:
        """What a micro-batch adds to the loss for its routers' sake, as a sum over valid tokens."""
        penalty, sums = routing_loss(
            routing.logits_LTE,
            routing.experts_LTA,
            valid_BS,
            balance=self.config.balance_loss,
            z=self.config.z_loss,
        )
        for name, value in sums.items():
            self.program.meters.add(name, value, valid_BS.sum())
        return penalty

    def _report(self, stop: int) -> None:
        at, total = self.at, self.steps
        log_now = at % self.config.log_every == 0 or at == total
        evaluate_now = bool(self.config.eval_every) and at % self.config.eval_every == 0 and at < total
        if not (log_now or evaluate_now or at == stop):
            return
        problem = self.watch.problem()
        if problem is not None:
            log_now, evaluate_now = True, False
        row: dict[str, float] = {}
        histograms: dict[str, list[float]] = {}
        if log_now:
            row, histograms = self.program.meters.flush(self.dist.sum if self.dist.world > 1 else None)
            seconds, waited, tokens = self._window
            self._window = [0.0, 0.0, 0]
            row["tokens"] = at * self.config.batch * self.sample_tokens
            if seconds > 0:
                row |= {"tokens_per_second": tokens / seconds, "stall": waited / seconds}
            row |= self.program.figures()
            text = f"loss {row['loss']:.3f}" if "loss" in row else ""
            self.tracker.progress(self.role, at, total, tokens=int(tokens), text=text)
        if evaluate_now:
            row |= (found := self.held_out(self.engine.model))
            if not all(map(math.isfinite, found.values())):
                problem = f"held-out loss is not finite at step {at}"
        if log_now or evaluate_now:
            self.tracker.log(self.role, at, row, histograms)
        if problem is not None:
            raise self.diverged(problem)
