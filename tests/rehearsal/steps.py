"""Whole steps of our code on a rehearsed card: the real trainers and recipes, on batches made up."""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from hydra import compose, initialize_config_dir

from distill.cache import SoftTargets, make_codec
from distill.config.load import CONF, load
from distill.config.schema import RunConfig, VisionConfig
from distill.config.spelling import spelt
from distill.data.join import Batch
from distill.engine import deepspeed_engine
from distill.engine.dist import Dist
from distill.engine.watch import Watch
from distill.model import Transformer
from distill.model.hidden_projector import attach
from distill.model.images import Images
from distill.run.models import parts_of
from distill.run.trainer import Trainer
from losses.weighting import Setting
from student.distilling import StudentRecipe
from student.live_teacher import LiveTeacher
from student.soft_loss import SoftLoss
from teacher.capture import Capture
from teacher.labelling import Own
from teacher.pretraining import TeacherRecipe
from tests.rehearsal import plain_engine
from tests.rehearsal.card import DEVICE, Card, inserted

B, S, K, V, STEPS = 4, 64, 5, 512, 10
ALONE = Dist(0, 1, DEVICE)
CORPORA = ["main", "other"]


@cache
def composed(*arguments: str) -> RunConfig:
    """The smoke in small, a layer of each kind of attention; a row of metrics at every step."""
    train = (f"train.steps={STEPS}", f"train.batch={B}", "train.log_every=1", "train.eval_every=0")
    keys = (*train, "model.layers=2", "model.nope_step=2")
    shape = [f"{role}.{key}" for role in ("teacher", "student") for key in keys]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return load(compose("config", overrides=spelt(["job=codistill", "experiment=smoke", *shape, *arguments])))


def configured(*arguments: str, **values: Any) -> RunConfig:
    """A composed configuration (half a second each, so few are) with other values, by key with `__` for dots."""
    config = composed(*arguments)
    for key, value in values.items():
        config = _changed(config, key.split("__"), value)
    return config


def _changed(config: Any, path: list[str], value: Any) -> Any:
    name, *below = path
    return dataclasses.replace(config, **{name: _changed(getattr(config, name), below, value) if below else value})


@contextmanager
def rehearsed() -> Iterator[Card]:
    with mock.patch.object(deepspeed_engine, "_deepspeed", lambda: plain_engine), inserted() as card:
        yield card


def a_batch(vision: VisionConfig | None = None, *, covered: bool = False) -> Batch:
    """Two documents a sample, two corpora; as a `Feed` hands it over."""
    number = torch.arange(B * S).view(B, S)
    documents_BS = (torch.arange(S) >= S // 3).int().expand(B, S).contiguous()
    level_B = torch.linspace(2.0, 3.0, B)
    targets, images = None, None
    if covered:
        ids_TK, token_T = torch.arange(K).expand(B * S, K).contiguous(), torch.full((B * S,), 2.0)
        targets = SoftTargets(ids_TK, torch.full((B * S, K), 1 / K), number.flatten() % 7 > 0, -token_T, token_T)
    if vision is not None:
        patch_BS = torch.full((B, S), -1)
        patch_BS[:, 1 : 1 + vision.tile_tokens] = torch.arange(B * vision.tile_tokens).view(B, -1)
        images = Images(torch.zeros(B, 3, vision.tile_size, vision.tile_size, dtype=torch.uint8), patch_BS)
    return Batch(
        number % V,
        (number + 1) % V,
        number % 5 > 0,
        documents_BS,
        np.arange(B),
        np.arange(B) % len(CORPORA),
        np.zeros(B, np.uint64),
        targets,
        level_B,
        torch.zeros(B, dtype=torch.int64),
        level_B,
        level_B - 0.5,
        level_B + 0.5,
        images,
        0 if vision is None else vision.tile_tokens,
    ).pinned(DEVICE)


class NoWriter:
    """Takes targets and keeps none."""

    stats = SimpleNamespace(skipped=0, passed=0, tokens=0, bytes=0)

    def put(self, *_: Any, **__: Any) -> None:
        pass

    def hand_over(self) -> list[Any]:
        return []

    flush = finish = put


def capture_of(config: RunConfig, watch: Watch | None) -> Capture:
    codec = make_codec(config.cache.codec, config.teacher.model.vocab_size)
    return Capture(codec, [NoWriter() for _ in CORPORA], 0, "teacher", lambda step: step, watch)  # type: ignore[misc]


class Diverged(Exception):
    """What a trainer raises at each row: a value that the host reads is 1, here the step that was not finite."""


def run_of(config: RunConfig) -> Any:
    return SimpleNamespace(config=config, dist=ALONE, restored=None, tracker=mock.Mock(), diverged=Diverged)


def teacher_trainer(config: RunConfig) -> Trainer:
    part, watch = config.teacher, Watch(ALONE)
    recipe = TeacherRecipe(part.train.head_chunk, capture_of(config, watch) if part.capture else None)
    return Trainer(
        run_of(config), "teacher", Transformer(part.model, parts_of(run_of(config))), recipe, mock.Mock(), watch, STEPS
    )


def student_trainer(config: RunConfig, codec: str = "", live: Own | None = None) -> Trainer:
    part = config.student
    model, projector, teacher = Transformer(part.model, parts_of(run_of(config))), None, None
    if live is not None:
        teacher = LiveTeacher(live.hidden, lambda: live.unembedding, live.unembedding.shape[1], lambda: 0, "x")
        if part.hidden_match:
            projector = attach(model, teacher.width, 0)
    setting = Setting(V, V, len(CORPORA), 10_000, math.inf, DEVICE)
    loss = SoftLoss(part, [codec] if codec else [], projector)
    recipe = StudentRecipe(part, ALONE, setting, STEPS, CORPORA, loss, teacher)
    return Trainer(run_of(config), "student", model, recipe, mock.Mock(), Watch(ALONE), STEPS)


def train(card: Card, trainer: Trainer, batch: Batch, steps: int = 1) -> None:
    """Steps as `Trainer.advance` makes them, to where there is still a step to make, and what is logged of them."""
    with card.step():
        for _ in range(steps):
            trainer._train_step(batch)
            with suppress(Diverged):
                trainer._report(STEPS)
