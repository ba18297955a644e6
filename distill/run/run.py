"""A run: its folder, its data, its records, and how it starts, resumes and ends.

Everything of a run lies in its folder: `config.yaml`, `data/`, `metrics.jsonl`, `checkpoints/`, `cache/`,
`report.html`, and `summary.json`, which says that the run is finished.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from omegaconf import OmegaConf

from distill.config import json_text, stop
from distill.config.checks import vision_problems
from distill.config.errors import ConfigError, DataError, DivergenceError
from distill.config.files import write_text
from distill.config.load import to_dict
from distill.config.model import moe_layers, rope_layers
from distill.config.registry import JOBS
from distill.config.schema import DataConfig, ModelConfig, RunConfig, TrainConfig, VisionConfig
from distill.data.join import Batch, Joiner
from distill.data.prepare import Prepared, prepare
from distill.data.tokenizer import TOKENIZER, Tokenizer
from distill.engine import checkpoint
from distill.engine.checkpoint import Checkpoint
from distill.engine.dist import Dist
from distill.engine.zero import Engine, load_weights
from distill.model import Transformer, hf
from distill.model.balance import degenerate_routers
from distill.model.freeze import freeze
from distill.run import folder as run_folder
from distill.run import identity
from distill.run.folder import shown
from distill.run.identity import Lineage
from distill.run.trainer import Trainer
from distill.tracking import report
from distill.tracking.tracker import Tracker
from student.evaluate import Evaluation, evaluate


class Run:
    """One run folder on all ranks; as a context, lets go of all that it has opened, whatever ends it.

    Args:
        folder: created here; a folder that holds a run already needs resume=true.
        data: of the run that this one is an arm of; None prepares its own (job=backfill does, once it has its teacher).

    Attributes:
        finished: the folder holds a finished run; nothing is to be done.
        restored: the checkpoint to go on from, or None.
        lineages: of the teachers in training, by role; in every checkpoint.
    """

    def __init__(self, config: RunConfig, folder: Path, dist: Dist, data: Prepared | None = None):
        self.config, self.folder, self.dist = config, folder, dist
        self.began = time.perf_counter()
        self.summary_path = folder / run_folder.SUMMARY
        self.checkpoints = folder / run_folder.CHECKPOINTS
        problem = dist.from_main(self._claim() if dist.is_main else None)
        if problem:
            raise ConfigError(*problem)
        self.resources = ExitStack()
        self.finished = dist.from_main(config.resume and self.summary_path.exists())
        if self.finished:
            return
        goes_on = dist.from_main((folder / run_folder.CONFIG).exists())
        self.restored = checkpoint.newest(self.checkpoints) if config.resume else None
        state: dict[str, Any] = self.restored.state if self.restored else {"seconds": 0.0, "roles": {}}
        self.seconds_before: float = state["seconds"]
        self.saved = self.restored.step if self.restored else None
        """Step of the last checkpoint that this process has read or written."""
        self.lineages = {role: Lineage(**record) for role, record in state.get(identity.KEY, {}).items()}
        self._loaded: dict[str, Transformer] = {}
        # First of all the data: a run that is refused for them has changed nothing.
        if data is not None:
            self._check_data(data)
            self.data = data
        elif config.job != "backfill":
            self.prepare(min(getattr(config, role).model.vocab_size for role in self.roles))
        if dist.is_main:
            checkpoint.clear_half_written(self.checkpoints)
            write_text(folder / run_folder.CONFIG, OmegaConf.to_yaml(OmegaConf.create(to_dict(config))))
        self.tracker = Tracker(
            folder,
            config.tracking,
            to_dict(config),
            enabled=dist.is_main,
            resume_steps={role: s["step"] for role, s in state["roles"].items()} if config.resume else None,
        )
        self.resources.push(self.tracker)
        trains = bool(JOBS[config.job].trains)
        if goes_on and self.restored is None and trains and dist.is_main:
            self.tracker.message(f"{self.checkpoints} has no checkpoint: the run starts from its beginning")

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self.resources.__exit__(*error)

    def _claim(self) -> list[str]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            return [f"hydra.run.dir is {self.folder}; cannot write there: {error.strerror}"]
        return list(run_folder.problems(self.folder, self.config))

    def prepare(self, vocab_size: int) -> None:
        """Tokenizer and packed corpora, for models of this vocabulary; collective."""
        data = self.config.data
        folder = Path(data.dir) if data.dir else self.folder / "data"
        prepared = None
        for turn in (True, False):  # the main rank packs, the others find it packed
            if self.dist.is_main is turn:
                prepared = prepare(data, folder, vocab_size)
            self.dist.barrier()
        assert prepared is not None
        self._check_data(prepared)
        if self.config.job != "evaluate":
            for role in self.roles:
                check_vision(f"{role}.model.vision", getattr(self.config, role).model.vision, data, prepared.tokenizer)
        if self.dist.is_main:  # whoever exports a model of this run needs no data
            prepared.tokenizer.save(self.folder / TOKENIZER)
        self.data = prepared

    def _check_data(self, prepared: Prepared) -> None:
        """Refuses other data than those that the run's checkpoint was trained on, whether or not a cache is read.

        Raises:
            DataError: a line for the tokenizer and for each part of a corpus that changed.
        """
        before = self.restored.state.get("data", {}) if self.restored is not None else {}
        wrong = [
            f"{key} has digest {digest}; the run in {self.folder} was started with {before[key]}: put back the files "
            "that it was made of, or start anew in another folder"
            for key, digest in prepared.digests.items()
            if before.get(key, digest) != digest
        ]
        if wrong:
            raise DataError("\n".join(wrong))

    @property
    def roles(self) -> tuple[str, ...]:
        job = self.config.job
        others = {"codistill": ("teacher", "student"), "evaluate": ("student",), "backfill": ()}
        return others.get(job, (job,))

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
        start = self._start(role)
        if self.restored is not None:
            model = Transformer(part.model)
            tensors = self.restored.tensors(role)
        elif start is not None:
            model = self._loaded.pop(role) if role in self._loaded else load_model(start, role, part.model)
        else:
            model = Transformer(part.model)
        if self.restored is None and (layers := degenerate_routers(model)):
            raise ConfigError(
                f"{role}.init_from is {start}; the routers of layers {layers} have equal rows and an equal bias: every "
                "token would go to the same experts, and no loss would show it. Give these routers random weights"
            )
        model.activation_checkpointing = part.train.activation_checkpointing
        freeze(model, part.train.freeze)
        return Engine(model, part.optim, self.config.engine, self.config.precision, self.dist, tensors)

    def _start(self, role: str) -> Path | None:
        """Where the first weights of a role are loaded from; None: they are drawn."""
        start = getattr(self.config, role).init_from or (self.config.init_from if len(self.roles) == 1 else None)
        return None if start is None else Path(start)

    def first_weights(self, role: str) -> dict[str, Any]:
        """What decides them, for a teacher's lineage; what it loads stays for `engine`. Collective."""
        model, start = getattr(self.config, role).model, self._start(role)
        if start is None:
            return {"seed": self.config.seed, "init_std": model.init_std}
        loaded = load_model(start, role, model)
        if self.restored is None:
            self._loaded[role] = loaded
        return {"digest": self.dist.from_main(identity.of_weights(loaded) if self.dist.is_main else None)}

    def restore(self, trainers: dict[str, Trainer]) -> None:
        if self.restored is not None:
            for role, trainer in trainers.items():
                trainer.load_state(self.restored.state["roles"][role])
            for tensors in self.restored.rest(self.dist.rank, self.dist.world):
                for role, trainer in trainers.items():
                    own = {k.removeprefix(f"{role}/"): t for k, t in tensors.items() if k.startswith(f"{role}/")}
                    trainer.take_back(own)
            steps = ", ".join(f"{role} step {t.at}" for role, t in trainers.items())
            self.tracker.message(f"resumed from {self.restored.folder}: {steps}")

    def save(self, trainers: dict[str, Trainer], **more: Any) -> None:
        """One checkpoint of all models, with `more` in its state; collective.

        Raises:
            DivergenceError: one of them has diverged; nothing is written.
            Stopped: then, where SIGTERM has stopped a trainer.
        """
        for trainer in trainers.values():
            trainer.check()
        step = sum(trainer.at for trainer in trainers.values())
        if step != self.saved:
            self._save(trainers, step, more)
            self.saved = step
        if any(trainer.stopped for trainer in trainers.values()):
            raise stop.Stopped(signal.SIGTERM)

    def _save(self, trainers: dict[str, Trainer], step: int, more: dict[str, Any]) -> None:
        state = more | {
            "seconds": self.seconds,
            "roles": {role: trainer.state() for role, trainer in trainers.items()},
            "models": {role: to_plain(getattr(self.config, role).model) for role in trainers},
            identity.KEY: {role: dataclasses.asdict(known) for role, known in self.lineages.items()},
            "data": self.data.digests,
        }
        engines = {role: trainer.engine for role, trainer in trainers.items()}
        keep = max(getattr(self.config, role).train.keep_checkpoints for role in trainers)
        rest = {
            f"{role}/{key}": part for role, trainer in trainers.items() for key, part in trainer.hand_over().items()
        }
        checkpoint.save(self.checkpoints, step, engines, state, self.dist, keep, rest)

    def held_out(self, samples: int | None, batch: int) -> Iterator[Batch]:
        """This rank's held-out batches: the first `samples` of every held-out corpus (None: all)."""
        joiner = Joiner(list(self.data.held_out.values()), None, self.config.cache.on_missing)
        for index, corpus in enumerate(self.data.held_out.values()):
            count = len(corpus) if samples is None else min(samples, len(corpus))
            mine = np.arange(self.dist.rank, count, self.dist.world)
            for start in range(0, len(mine), batch):
                ids_B = mine[start : start + batch]
                yield joiner.batch(np.full(len(ids_B), index), ids_B)

    def evaluate(self, model: Any, teacher: Any = None, role: str | None = None) -> Evaluation:
        """On the whole held-out text (`evaluate.samples`).

        Args:
            role: of the model, where this run has trained it; None: it is that of `init_from`.

        Raises:
            DivergenceError: the loss of model or teacher is not finite.
        """
        e = self.config.evaluate
        batches, names = self.held_out(e.samples, e.batch), list(self.data.held_out)
        result = evaluate(model, stop.checked(batches), names, self.dist, bins=e.calibration_bins, teacher=teacher)
        told = "the loss on held-out text is not finite"
        if not math.isfinite(result.loss):
            where = f"the model of init_from={self.config.init_from}"
            raise DivergenceError(f"{where}: {told}") if role is None else self.diverged(role, told)
        if result.agreement is not None and not math.isfinite(result.agreement):
            raise DivergenceError(f"the teacher of evaluate.teacher_from={e.teacher_from}: {told}")
        return result

    def diverged(self, role: str, what: str) -> DivergenceError:
        """The error that ends the training of a role; what: was not finite, and when."""
        arm, rate = "", f"{role}.optim.lr"
        if self.folder.parent.name == "arms":
            arm, rate = f" of arm {self.folder.name}", f"codistill.arms.{self.folder.name}.lr"
        optim, last = getattr(self.config, role).optim, checkpoint.last(self.checkpoints)
        again = f"with a lower {rate} (now {optim.lr:g}) or {role}.optim.clip (now {optim.clip:g})"
        way_out = f"; no checkpoint was saved before: start another run {again}"
        if last is not None:
            way_out = (
                f"; the last good checkpoint is {last}: resume=true goes on from it, and if the run diverges again, "
                f"start another from there ({role}.init_from) {again}"
            )
        return DivergenceError(f"{role}{arm}: {what}{way_out}")

    def glance(self, model: Any, train: TrainConfig) -> dict[str, float]:
        """The same on the first held-out samples, as a row of metrics, for curves."""
        micro = max(1, train.batch // (self.dist.world * train.accumulation))
        batches, names = self.held_out(train.eval_samples, micro), list(self.data.held_out)
        return self.heldout(evaluate(model, batches, names, self.dist))

    def heldout(self, result: Evaluation) -> dict[str, float]:
        """Metrics `heldout_loss` and, of a mixture, `heldout_loss/<corpus>` and `heldout_accuracy/<corpus>`."""
        row = {"heldout_loss": result.loss}
        if len(self.data.held_out) > 1:
            for name, part in result.corpora.items():
                row |= {f"heldout_loss/{name}": part.loss, f"heldout_accuracy/{name}": part.accuracy}
        return row

    def figures(self, name: str, result: Evaluation) -> dict[str, Any]:
        """What a summary says of a model: `<name>_loss`; `<name>_accuracy` on `evaluate.accuracy_on`; and, of a
        mixture, `<name>_corpora`, loss and accuracy on each corpus."""
        found: dict[str, Any] = {f"{name}_loss": result.loss}
        if (on := self.config.evaluate.accuracy_on) is not None:
            if on not in result.corpora:
                raise DataError(
                    f"evaluate.accuracy_on is {on}; none of its held-out labels that were read carries loss"
                )
            found[f"{name}_accuracy"] = result.corpora[on].accuracy
        if len(self.data.held_out) > 1:
            found[f"{name}_corpora"] = {
                corpus: {"loss": part.loss, "accuracy": part.accuracy} for corpus, part in result.corpora.items()
            }
        return found

    def summary(self) -> dict[str, Any]:
        """What a finished run wrote, on every rank."""
        found: dict[str, Any] = self.dist.from_main(run_folder.summary(self.folder) if self.dist.is_main else None)
        return found

    def finish(self, summary: dict[str, Any]) -> None:
        """Ends the run: `summary.json`, then the report."""
        self.tracker.close()
        if self.dist.is_main:
            write_text(self.summary_path, json_text.dumps(summary, indent=1) + "\n")
            if self.config.tracking.report:
                self.tracker.message(f"report: {report.write(self.folder)}")
        self.dist.barrier()


def as_job(body: Callable[[Run], None]) -> Callable[[RunConfig, Path, Dist], None]:
    """The function of a job (`distill.config.registry`) that takes place in one run folder."""

    @functools.wraps(body)
    def job(config: RunConfig, folder: Path, dist: Dist) -> None:
        run = Run(config, folder, dist)
        if run.finished:
            if dist.is_main:
                print(f"{folder}: finished; nothing to resume")
            return
        with run:
            body(run)

    return job


def check_vision(key: str, vision: VisionConfig | None, data: DataConfig, tokenizer: Tokenizer) -> None:
    """Refuses a model that cannot take the images of a run, or has another token for them than the tokenizer."""
    if data.has_images and (problems := list(vision_problems(key, vision, data.images, tokenizer.image_ids().patch))):
        raise ConfigError(*problems)


def load_model(folder: Path, role: str, want: ModelConfig | None, found: Checkpoint | None = None) -> Transformer:
    """A model from a Hugging Face folder, a checkpoint of ours, or a run folder.

    Args:
        role: which model of a checkpoint that holds several.
        want: refuse another architecture, naming the keys that differ; of a model with vision the text model alone is
            taken where `want` has none. None takes what is there.
        found: the checkpoint in the folder, where it is open already: its files need not be verified again.
    """
    with_vision = want is None or want.vision is not None
    if (folder / "config.json").exists():
        model = hf.load(folder, vision=with_vision)
    else:
        found = found or checkpoint.find(folder)
        name = role_in(found, role)
        stored = OmegaConf.merge(OmegaConf.structured(ModelConfig), found.state["models"][name])
        config = cast(ModelConfig, OmegaConf.to_object(stored))
        tensors = found.tensors(name, ("param/", "buffer/"))
        if not with_vision:
            config = dataclasses.replace(config, vision=None)
            tensors = {key: t for key, t in tensors.items() if not key.removeprefix("param/").startswith(hf.VISION)}
        model = Transformer(config)
        load_weights(model, tensors)
    if want is not None:
        unlike = list(_unlike(architecture(want), architecture(model.config)))
        if unlike:
            raise ConfigError(
                *[f"{role}.model.{key} is {shown(a)}; the model in {folder} has {shown(b)}" for key, a, b in unlike]
            )
        model.config = want  # the same model, as the run spells it
    return model


def role_in(found: Checkpoint, role: str) -> str:
    """The model of a checkpoint that a job means by a role: it, or where there is none the first."""
    return role if role in found.engines else found.engines[0]


def architecture(config: ModelConfig) -> dict[str, Any]:
    """What a model must share with another to take its weights and compute the same, however either spells it."""
    plain = to_plain(config)
    free = ("bos_id", "eos_ids", "pad_id", "init_std", "max_positions", "parametrization", "base")
    for key in (*free, "moe_step", "nope_step"):
        del plain[key]
    if config.chunk_size is not None and config.chunk_size >= config.max_positions:
        plain["chunk_size"] = None  # the Hugging Face format has no null here
    return plain | {"moe_layers": moe_layers(config), "rope_layers": rope_layers(config)}


def _unlike(here: dict[str, Any], there: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Key and both values, wherever two of them differ."""
    for key, value in here.items():
        if isinstance(value, dict) and isinstance(there[key], dict):
            yield from _unlike(value, there[key], f"{prefix}{key}.")
        elif value != there[key]:
            yield prefix + key, value, there[key]


def to_plain(config: ModelConfig) -> dict[str, Any]:
    """The configuration as JSON-able values."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True))
