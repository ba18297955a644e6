"""A run: its folder, its data, its records, and how it starts, resumes and ends.

Everything of a run lies in its folder: `config.yaml`, `data/`, `metrics.jsonl`, `checkpoints/`, `cache/`,
`report.html`, and `summary.json`, which says that the run is finished.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from omegaconf import OmegaConf

from distill.config.errors import ConfigError
from distill.config.files import write_text
from distill.config.load import to_dict
from distill.config.schema import ModelConfig, RunConfig, TrainConfig
from distill.data.join import Batch, Joiner
from distill.data.prepare import Prepared, prepare
from distill.engine import checkpoint
from distill.engine.dist import Dist
from distill.engine.zero import Engine, load_weights
from distill.model import Transformer, hf
from distill.run.trainer import Trainer
from distill.tracking import report
from distill.tracking.tracker import Tracker
from student.evaluate import Evaluation, evaluate

# May differ between a run and its resumption: they change nothing that is computed.
_FREE = (
    "resume",
    "engine.",
    "tracking.",
    "evaluate.",
    "data.dir",
    "cache.dir",
    "cache.queue",
    "cache.follow",
    "teacher.train.keep_checkpoints",
    "student.train.keep_checkpoints",
)


class Run:
    """One run folder on all ranks.

    Args:
        folder: created here; a folder that holds a run already needs resume=true.
        data: of the run that this one is an arm of; None prepares its own.

    Attributes:
        finished: the folder holds a finished run; nothing is to be done.
        restored: the checkpoint to go on from, or None.
    """

    def __init__(self, config: RunConfig, folder: Path, dist: Dist, data: Prepared | None = None):
        self.config, self.folder, self.dist = config, folder, dist
        self.began = time.perf_counter()
        self.summary_path = folder / "summary.json"
        self.checkpoints = folder / "checkpoints"
        problem = dist.from_main(self._claim() if dist.is_main else None)
        if problem:
            raise ConfigError(*problem)
        self.finished = dist.from_main(config.resume and self.summary_path.exists())
        if self.finished:
            return
        self.restored = checkpoint.newest(self.checkpoints) if config.resume else None
        state: dict[str, Any] = self.restored.state if self.restored else {"seconds": 0.0, "roles": {}}
        self.seconds_before: float = state["seconds"]
        if dist.is_main:
            checkpoint.clear_half_written(self.checkpoints)
            write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(to_dict(config))))
        self.tracker = Tracker(
            folder,
            config.tracking,
            to_dict(config),
            enabled=dist.is_main,
            resume_steps={role: s["step"] for role, s in state["roles"].items()} if config.resume else None,
        )
        self.data = data or self._prepare()

    def _claim(self) -> list[str]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            return [f"hydra.run.dir is {self.folder}; cannot write there: {error.strerror}"]
        path = self.folder / "config.yaml"
        if not path.exists():
            return []
        if not self.config.resume:
            return [f"hydra.run.dir is {self.folder}; it holds a run: set resume=true, or choose another folder"]
        before = _flat(OmegaConf.to_container(OmegaConf.load(path)))
        now = _flat(to_dict(self.config))
        return [
            f"{key} is {now.get(key)}; the run in {self.folder} was started with {before.get(key)}"
            for key in sorted(before.keys() | now.keys())
            if not key.startswith(_FREE) and before.get(key) != now.get(key)
        ]

    def _prepare(self) -> Prepared:
        data = self.config.data
        folder = Path(data.dir) if data.dir else self.folder / "data"
        sizes = [getattr(self.config, role).model.vocab_size for role in self.roles]
        prepared = None
        for turn in (True, False):  # the main rank packs, the others find it packed
            if self.dist.is_main is turn:
                prepared = prepare(data, folder, min(sizes))
            self.dist.barrier()
        assert prepared is not None
        return prepared

    @property
    def roles(self) -> tuple[str, ...]:
        job = self.config.job.value
        return {"codistill": ("teacher", "student"), "evaluate": ("student",)}.get(job, (job,))

    @property
    def seconds(self) -> float:
        """Wall time of this run, earlier parts of a resumed one included."""
        return self.seconds_before + time.perf_counter() - self.began

    def engine(self, role: str) -> Engine:
        """The model of a role under DeepSpeed: restored, started from `init_from`, or fresh from the seed."""
        part = getattr(self.config, role)
        # The same student for every arm of a seed; another stream than the teacher's.
        torch.manual_seed(self.config.seed * 2 + (role == "student"))
        tensors = None
        start = part.init_from or (self.config.init_from if len(self.roles) == 1 else None)
        if self.restored is not None:
            model = Transformer(part.model)
            tensors = self.restored.tensors(role)
        elif start is not None:
            model = load_model(Path(start), role, part.model)
        else:
            model = Transformer(part.model)
        return Engine(model, part.optim, self.config.engine, self.config.precision, self.dist, tensors)

    def restore(self, trainers: dict[str, Trainer]) -> None:
        if self.restored is not None:
            for role, trainer in trainers.items():
                trainer.load_state(self.restored.state["roles"][role])
            steps = ", ".join(f"{role} step {t.at}" for role, t in trainers.items())
            self.tracker.message(f"resumed from {self.restored.folder}: {steps}")

    def save(self, trainers: dict[str, Trainer]) -> None:
        """One checkpoint of all models; collective."""
        state = {
            "seconds": self.seconds,
            "roles": {role: trainer.state() for role, trainer in trainers.items()},
            "models": {role: to_plain(getattr(self.config, role).model) for role in trainers},
        }
        engines = {role: trainer.engine for role, trainer in trainers.items()}
        keep = max(getattr(self.config, role).train.keep_checkpoints for role in trainers)
        step = sum(trainer.at for trainer in trainers.values())
        checkpoint.save(self.checkpoints, step, engines, state, self.dist, keep)

    def held_out(self, samples: int | None, batch: int) -> Iterator[Batch]:
        """This rank's held-out batches: the first `samples` of every held-out corpus (None: all)."""
        joiner = Joiner(list(self.data.held_out.values()), None, self.config.cache.on_missing)
        for index, corpus in enumerate(self.data.held_out.values()):
            count = len(corpus) if samples is None else min(samples, len(corpus))
            mine = np.arange(self.dist.rank, count, self.dist.world)
            for start in range(0, len(mine), batch):
                ids_B = mine[start : start + batch]
                yield joiner.batch(np.full(len(ids_B), index), ids_B)

    def evaluate(self, model: Any, teacher: Any = None) -> Evaluation:
        """On the whole held-out text (`evaluate.samples`)."""
        e = self.config.evaluate
        return evaluate(model, self.held_out(e.samples, e.batch), self.dist, bins=e.calibration_bins, teacher=teacher)

    def quick_loss(self, model: Any, train: TrainConfig) -> float:
        """Nats per token on the first held-out samples, for curves."""
        micro = max(1, train.batch // (self.dist.world * train.accumulation))
        return evaluate(model, self.held_out(train.eval_samples, micro), self.dist).loss

    def summary(self) -> dict[str, Any]:
        """What a finished run wrote, on every rank."""
        text = self.dist.from_main(self.summary_path.read_text() if self.dist.is_main else None)
        found: dict[str, Any] = json.loads(text)
        return found

    def finish(self, summary: dict[str, Any]) -> None:
        """Ends the run: `summary.json`, then the report."""
        self.tracker.close()
        if self.dist.is_main:
            write_text(self.summary_path, json.dumps(summary, indent=1) + "\n")
            if self.config.tracking.report:
                self.tracker.message(f"report: {report.write(self.folder)}")
        self.dist.barrier()


def load_model(folder: Path, role: str, want: ModelConfig | None) -> Transformer:
    """A model from a Hugging Face folder, a checkpoint of ours, or a run folder.

    Args:
        role: which model of a checkpoint that holds several.
        want: refuse another size, naming the keys that differ; None takes what is there.
    """
    if (folder / "config.json").exists():
        model = hf.load(folder)
    else:
        found = checkpoint.find(folder)
        name = role if role in found.engines else found.engines[0]
        stored = OmegaConf.merge(OmegaConf.structured(ModelConfig), found.state["models"][name])
        model = Transformer(cast(ModelConfig, OmegaConf.to_object(stored)))
        load_weights(model, found.tensors(name, ("param/", "buffer/")))
    if want is not None:
        here, there = to_plain(want), to_plain(model.config)
        free = ("bos_id", "eos_ids", "pad_id", "init_std", "max_positions", "parametrization", "base")
        shape = [k for k in here if here[k] != there[k] and k not in free]
        if shape:
            raise ConfigError(*[f"{role}.model.{k} is {here[k]}; the model in {folder} has {there[k]}" for k in shape])
        # No property of the weights: it decides how they learn from here on.
        model.config = dataclasses.replace(model.config, parametrization=want.parametrization, base=want.base)
    return model


def to_plain(config: ModelConfig) -> dict[str, Any]:
    """The configuration as JSON-able values."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}
