"""The one training loop, from `train` down to the backward pass; teacher and student differ in their recipe, not here.

Everything that a trainer does at step s follows from (seed, s) and its explicit state, so a run may be cut at any
checkpoint and go on as if nothing had happened.

A loss, gradient norm or weight that is not finite ends the run: noted on the device at every step, read when metrics
flush, before a held-out evaluation and before a checkpoint. The update itself is made, or left out by DeepSpeed's
stage 1: what counts is the last checkpoint.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill.config.load import to_dict
from distill.config.schema import Freeze, StudentConfig, TeacherConfig
from distill.config.stop import Stopped
from distill.data.join import Batch
from distill.data.prefetch import Prefetch
from distill.engine import checkpoint
from distill.engine.halt import Halt
from distill.engine.optim import learning_rate
from distill.engine.recipe import Recipe
from distill.engine.watch import Watch
from distill.model import Transformer
from distill.model.balance import load_stats, update_bias
from distill.model.transformer import Routing
from distill.run.evaluation import glance
from distill.run.feed import Feed
from distill.run.identity import LINEAGES
from distill.run.models import engine_of
from distill.run.run import Run
from distill.tracking.meters import Meters
from losses import routing_loss


class Leg(NamedTuple):
    """A stretch of training without a checkpoint inside."""

    trainer: Trainer
    goal: int
    """The step at which it ends."""
    save: bool = True
    """A checkpoint is written at its end."""


def train(run: Run, trainers: dict[str, Trainer], legs: Callable[[str | None], Iterable[Leg]]) -> None:
    """Opens the run's records, restores trainers, by role, and takes them through legs, with a checkpoint after each.

    Args:
        legs: makes the legs that are left, given the role of the trainer that a signal stopped within its leg, if one
            did; each leg is made when the one before it is done.

    Raises:
        DivergenceError: on every rank, if anything was not finite.
        Stopped: after SIGTERM with a checkpoint of the step that was being made, after Ctrl-C without one.
    """
    run.start()
    _restore(run, trainers)
    for leg in legs(run.restored.state["stopped"] if run.restored else None):
        trainer = leg.trainer
        trainer.advance(leg.goal)
        if not trainer.stopped:
            # Before the checkpoint: what a resumed run takes as done is on disk.
            trainer.recipe.publish(last=trainer.step == trainer.steps)
        if leg.save or trainer.stopped:
            _save(run, trainers, trainer.role if trainer.stopped else None)
        if trainer.stopped:
            raise Stopped(signal.SIGTERM)


def to_checkpoints(trainer: Trainer, last: int | None = None, *, save_last: bool = True) -> Iterator[Leg]:
    """The legs of a trainer that trains alone.

    Args:
        last: the step at which it ends; None: all of its steps.
        save_last: a checkpoint is written there, too.
    """
    last = trainer.steps if last is None else last
    every = trainer.config.checkpoint_every or last
    while trainer.step < last:
        goal = min(last, (trainer.step // every + 1) * every)
        yield Leg(trainer, goal, save=save_last or goal < last)


class Update(NamedTuple):
    """What one optimizer step did, over all ranks."""

    norm: Tensor
    """Gradient norm before clipping, scalar."""
    counts_LE: Tensor
    """int64, tokens given to each expert of each MoE layer."""
    finite: Tensor
    """bool, scalar: the losses of all micro-batches are finite."""


class Trainer:
    """One model in training, at `step` of `steps`.

    Args:
        role: `job` of its rows in metrics.jsonl.
        model: with its first weights, on the CPU; the run's checkpoint replaces them, if there is one.
        steps: optimizer steps in all.
    """

    def __init__(
        self,
        run: Run,
        role: str,
        model: Transformer,
        recipe: Recipe,
        feed: Feed,
        watch: Watch,
        steps: int,
    ):
        part: TeacherConfig | StudentConfig = getattr(run.config, role)
        self.run, self.role, self.recipe, self.feed, self.watch = run, role, recipe, feed, watch
        self.config, self.optim, self.steps, self.step = part.train, part.optim, steps, 0
        self.engine = engine_of(run, role, model)
        self.dist = run.dist
        self.meters = Meters(self.dist.device)
        self.halt = Halt(self.dist)
        self.stopped = False
        """SIGTERM has ended `advance` before its goal."""
        self.clock = StepClock(part.train.batch * run.config.data.sample_tokens)

    def advance(self, goal: int) -> None:
        """Trains up to step `goal`, or after SIGTERM to the end of the step that is being made (`stopped`)."""
        assert goal <= self.steps, (goal, self.steps)
        while self.step < goal and not self.stopped:
            reach = self.feed.reach(self.step, goal)
            if reach is None:
                self.stopped = True
            else:
                self._advance(reach)

    def _advance(self, reach: int) -> None:
        with Prefetch(self.feed.batch, self.step, reach) as batches:
            self.clock.start(batches)
            for batch in batches:
                self._train_step(batch)
                self.clock.step()
                self._report(reach)
                if (asked := self.halt.asked()) is signal.SIGINT:
                    raise Stopped(asked)
                if asked is not None:
                    self.stopped = True
                    return
                self.clock.start(batches)

    def _train_step(self, batch: Batch) -> None:
        lr = learning_rate(self.optim, self.step, self.steps)
        update = self._update(self.recipe, self.meters, batch, lr)
        if self.config.balance_rate > 0 and self.config.freeze is not Freeze.text:
            update_bias(self.engine.model, update.counts_LE, self.config.balance_rate)
        self.step += 1
        self.watch.note(self.step, update.finite, update.norm.isfinite(), self.engine.weights_finite())
        self.meters.add("grad_norm", update.norm, 1.0)
        self.meters.add("lr", lr, 1.0)
        for name, value in load_stats(update.counts_LE).items():
            self.meters.add(name, value, 1.0)

    def _update(self, recipe: Recipe, meters: Meters, batch: Batch, lr: float) -> Update:
        """Forward and backward passes of all micro-batches, and the optimizer's update."""
        valid = self.halt.sum(batch.valid_BS.sum())
        batch = recipe.ready(batch, self.config.accumulation)
        plan = recipe.begin(batch, self.step)
        routed: list[Tensor] = []
        results: list[Any] = []
        broken = torch.zeros((), dtype=torch.int64, device=self.dist.device)
        micro_size = len(batch.ids_BS) // self.config.accumulation
        for start in range(0, len(batch.ids_BS), micro_size):
            micro = batch.rows(start, start + micro_size).to(self.dist.device)
            out = recipe.forward(self.engine.training_model, micro, plan)
            loss_sum = out.loss_sum + self._routing_loss(out.routing, micro.valid_BS, meters)
            self.engine.backward(loss_sum, valid)
            for name, mean in out.means.items():
                meters.add(name, mean.sum, mean.weight)
            for name, counts in out.histograms.items():
                meters.histogram(name, counts)
            broken += loss_sum.detach().isfinite().logical_not()
            routed.append(out.routing.counts_LE)
            results.append(out.result)
        norm = self.engine.update(lr)
        counts_LE = torch.stack(routed).sum(0)
        # One sum over ranks for both: a rank must not publish what another's loss has spoiled.
        sums = self.dist.sum(torch.cat([counts_LE.flatten(), broken[None]]))
        recipe.end(plan, results)
        return Update(norm, sums[:-1].view_as(counts_LE), sums[-1] == 0)

    def _routing_loss(self, routing: Routing, valid_BS: Tensor, meters: Meters) -> Tensor:
        """The penalties of a micro-batch's routers, as a sum over valid tokens."""
        penalty, sums = routing_loss(
            routing.logits_LTE,
            routing.experts_LTA,
            valid_BS,
            balance=self.config.balance_loss,
            z=self.config.z_loss,
        )
        for name, value in sums.items():
            meters.add(name, value, valid_BS.sum())
        return penalty

    def rehearse(self, recipe: Recipe, batch: Batch) -> None:
        """A step with another recipe in all but effect, for timing; inside `engine.rehearsal` nothing changes."""
        self._update(recipe, Meters(self.dist.device), batch, lr=0.0)

    def _report(self, goal: int) -> None:
        """Logs a row and evaluates, at the steps where `log_every` and `eval_every` fall."""
        step, last = self.step, self.step == self.steps
        log_now = step % self.config.log_every == 0 or last
        evaluate_now = bool(self.config.eval_every) and step % self.config.eval_every == 0 and not last
        if not (log_now or evaluate_now or step == goal):
            return
        problem = self.watch.problem()
        if problem is not None:
            log_now, evaluate_now = True, False
        row: dict[str, float] = {}
        histograms: dict[str, list[float]] = {}
        if log_now:
            row, histograms = self._logged()
        if evaluate_now:
            held_out = glance(self.run, self.engine.model, self.config)
            row |= held_out
            if not all(map(math.isfinite, held_out.values())):
                problem = f"held-out loss is not finite at step {step}"
        if log_now or evaluate_now:
            self.run.tracker.log(self.role, step, row, histograms)
        if problem is not None:
            raise self.run.diverged(self.role, problem)

    def _logged(self) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Metrics and histograms of the interval that ends."""
        row, histograms = self.meters.flush(self.dist.sum)
        window = self.clock.flush()
        row["tokens"] = self.step * self.clock.tokens_per_step
        if window.seconds > 0:
            row |= {"tokens_per_second": window.tokens / window.seconds, "stall": window.stalled / window.seconds}
        row |= self.recipe.metrics()
        text = f"loss {row['loss']:.3f}" if "loss" in row else ""
        self.run.tracker.progress(self.role, self.step, self.steps, tokens=window.tokens, text=text)
        return row, histograms

    def state(self) -> dict[str, Any]:
        joiner = self.feed.joiner
        return {"step": self.step, "recipe": self.recipe.state(), "views": joiner.views, "live": joiner.is_live}

    def load_state(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.recipe.load_state(state["recipe"])

    def hand_over(self) -> dict[str, Tensor]:
        """What this rank has of an interval that is not over: sums for the next row, and what the recipe has begun."""
        sums = {f"sums/{key}": tensor for key, tensor in self.meters.state().items()}
        return sums | {f"recipe/{key}": tensor for key, tensor in self.recipe.hand_over().items()}

    def take_back(self, tensors: dict[str, Tensor]) -> None:
        self.meters.load_state(_below("sums/", tensors))
        self.recipe.take_back(_below("recipe/", tensors))


class Window(NamedTuple):
    """Time in training steps."""

    seconds: float = 0.0
    stalled: float = 0.0
    """Of these seconds, those waiting for a batch."""
    tokens: int = 0


class StepClock:
    """Times steps, since the last logged row and since this process began."""

    def __init__(self, tokens_per_step: int):
        self.tokens_per_step = tokens_per_step
        self.window = self.total = Window()

    def start(self, batches: Prefetch[Batch]) -> None:
        self._batches, self._began, self._waited = batches, time.perf_counter(), batches.waited

    def step(self) -> None:
        seconds, stalled = time.perf_counter() - self._began, self._batches.waited - self._waited
        self.window, self.total = (
            Window(part.seconds + seconds, part.stalled + stalled, part.tokens + self.tokens_per_step)
            for part in (self.window, self.total)
        )

    def flush(self) -> Window:
        window, self.window = self.window, Window()
        return window

    @property
    def stall(self) -> float | None:
        """Share of the time of this process' steps spent waiting for a batch; None: there was no step."""
        return self.total.stalled / self.total.seconds if self.total.seconds else None


# ---------------------------------------------------------------- checkpoints


def _save(run: Run, trainers: dict[str, Trainer], stopped: str | None) -> None:
    """One checkpoint of all trainers, if they have moved; collective. stopped: the role that a signal stopped."""
    for trainer in trainers.values():
        if (problem := trainer.watch.problem()) is not None:
            raise run.diverged(trainer.role, problem)
    step = sum(trainer.step for trainer in trainers.values())
    if step == run.saved:
        return
    state = {
        "seconds": run.seconds,
        "stopped": stopped,
        "roles": {role: trainer.state() for role, trainer in trainers.items()},
        "models": {role: to_dict(getattr(run.config, role).model) for role in trainers},
        LINEAGES: {role: dataclasses.asdict(lineage) for role, lineage in run.lineages.items()},
        "data": run.data.digests,
    }
    engines = {role: trainer.engine for role, trainer in trainers.items()}
    keep = max(trainer.config.keep_checkpoints for trainer in trainers.values())
    rest = {f"{role}/{key}": part for role, trainer in trainers.items() for key, part in trainer.hand_over().items()}
    checkpoint.save(run.checkpoints, step, engines, state, run.dist, keep, rest)
    run.saved = step


def _restore(run: Run, trainers: dict[str, Trainer]) -> None:
    """The trainers as the run's checkpoint has them; their engines have loaded their tensors already."""
    if run.restored is None:
        return
    for role, trainer in trainers.items():
        trainer.load_state(run.restored.state["roles"][role])
    for tensors in run.restored.rest(run.dist.rank, run.dist.world):
        for role, trainer in trainers.items():
            trainer.take_back(_below(f"{role}/", tensors))
    steps = ", ".join(f"{role} step {trainer.step}" for role, trainer in trainers.items())
    run.tracker.message(f"resumed from {run.restored.folder}: {steps}")


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
