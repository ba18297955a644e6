"""Wiring: from a run to a trainer with its model, stream, caches and recipe."""

import dataclasses
import math
from typing import Any

from distill.cache import CacheReader
from distill.config.errors import ConfigError
from distill.config.schema import OnMissing, Parametrization, ReplayOrder, TrainConfig
from distill.data.join import Joiner
from distill.data.stream import Replay, Stream
from distill.data.teacher_levels import TeacherLevels
from distill.engine.watch import Watch
from distill.model import Transformer
from distill.model.hidden_projector import attach
from distill.run import identity
from distill.run.caches import cache_folders, open_capture
from distill.run.chosen_precision import decisive
from distill.run.feed import Feed, FollowingFeed
from distill.run.identity import Lineage
from distill.run.models import architecture, check_vision, first_model
from distill.run.run import Run
from distill.run.trainer import Trainer
from losses.weighting import Setting
from student.distilling import StudentRecipe
from student.live_teacher import LiveTeacher
from student.soft_loss import SoftLoss
from teacher.capture import Capture
from teacher.pretraining import TeacherRecipe


def prepare(run: Run, *vocab_sizes: int) -> None:
    """The data of a run that trains, for all its models; vocab_sizes: of others that read them."""
    models = [(role, getattr(run.config, role).model) for role in run.roles]
    run.prepare(min([*vocab_sizes, *(model.vocab_size for _, model in models)]))
    for role, model in models:
        check_vision(f"{role}.model.vision", model.vision, run.config.data, run.data.tokenizer)


def steps_of(run: Run, role: str) -> int:
    """Optimizer steps of a role: as given, or as many whole batches as its epochs have."""
    train: TrainConfig = getattr(run.config, role).train
    if train.batch % (run.dist.world * train.accumulation):
        raise ConfigError(
            f"{role}.train.batch is {train.batch}; it must be a multiple of ranks x accumulation, "
            f"{run.dist.world} x {train.accumulation}"
        )
    if train.steps is not None:
        return train.steps
    samples = sum(len(corpus) for corpus in run.data.train.values())
    steps = int(train.epochs * samples) // train.batch
    if steps == 0:
        raise ConfigError(f"{role}.train.epochs is {train.epochs}; {samples} samples give no batch of {train.batch}")
    return steps


def own_stream(run: Run) -> Stream:
    """Of the run's corpora by their weights and data.seed."""
    sizes = {name: len(corpus) for name, corpus in run.data.train.items()}
    weights = {name: run.config.data.corpora[name].weight for name in sizes}
    return Stream(sizes, weights, run.config.data.seed)


def teachers_stream(readers: list[CacheReader], names: list[str]) -> tuple[Stream, int]:
    """The stream that the caches of all corpora record, and how many of its positions the teacher planned.

    Raises:
        ConfigError: they record none (a backfill made one of them), or it is not one of these corpora.
    """
    way_out = "; student.replay.order=own trains on the run's own stream"
    for reader, name in zip(readers, names):
        recorded = reader.header.stream
        if not recorded:
            raise ConfigError(f"cache {reader.folder} of corpus {name} was backfilled and records no stream{way_out}")
        stream = Stream.from_description(recorded)
        if stream.names != names:
            raise ConfigError(
                f"data.corpora are {', '.join(names)}; the teacher of cache {reader.folder} had "
                f"{', '.join(stream.names)}{way_out}"
            )
        if recorded != readers[0].header.stream:
            raise ConfigError(f"caches {readers[0].folder} and {reader.folder} record streams that differ{way_out}")
    recorded = readers[0].header.stream
    return Stream.from_description(recorded), int(recorded["planned"])


def teacher(run: Run) -> tuple[Trainer, Capture | None]:
    part, steps = run.config.teacher, steps_of(run, "teacher")
    stream, batch = own_stream(run), part.train.batch
    model, source = first_model(run, "teacher")
    # A resumed run keeps the one that it started with.
    lineage = run.lineages.get("teacher") or lineage_of(run, model, source is not None, steps, stream)
    run.lineages["teacher"] = lineage
    watch, capture = Watch(run.dist), None
    if part.capture:
        planned = {**stream.describe(), "planned": steps * batch, "batch": batch}
        capture = open_capture(run, planned, cache_folders(run), lineage.base, watch)
    recipe = TeacherRecipe(part.train.head_chunk, capture, run.config.engine.debug)
    feed = _feed(run, stream, Replay(ReplayOrder.same, steps * batch), None, batch)
    return Trainer(run, "teacher", model, recipe, feed, watch, steps), capture


def lineage_of(run: Run, model: Transformer, is_loaded: bool, steps: int, stream: Stream) -> Lineage:
    """Of the run's teacher, as it starts. Collective.

    is_loaded: its first weights come from elsewhere, so they are named by their digest; else by what they are drawn
    with.
    """
    part, corpora = run.config.teacher, run.data.train
    like = architecture(part.model) | {"parametrization": part.model.parametrization}
    if part.model.parametrization is Parametrization.transfer:
        like["base"] = dataclasses.asdict(part.model.base)
    first: dict[str, Any] = {"seed": run.config.seed, "init_std": part.model.init_std}
    if is_loaded:
        first = {"digest": run.dist.from_main(identity.of_weights(model) if run.dist.is_main else None)}
    deciding = ("batch", "freeze", "balance_rate", "balance_loss", "z_loss")
    parts = {
        "first_weights": first,
        "architecture": like,
        "optim": dataclasses.asdict(part.optim),
        "train": {name: getattr(part.train, name) for name in deciding},
        "steps": steps,
        "precision": decisive(run.config.precision),
        "stream": [stream.seed, [[name, corpora[name].digest, share] for name, share in stream.shares.items()]],
    }
    digests = [corpus.digest for corpus in corpora.values()]
    return Lineage(identity.base_of(parts), digests, part.train.batch * run.config.data.sample_tokens)


def student(
    run: Run, readers: list[CacheReader] | None, live: LiveTeacher | None = None
) -> tuple[Trainer, StudentRecipe]:
    """A student on the teacher's stream as the cache records it, or (no cache, or order=own) on its own.

    live: the teacher of its targets; one that trains beside it has the same stream.
    """
    part, steps = run.config.student, steps_of(run, "student")
    if readers and part.replay.order is not ReplayOrder.own:
        stream, planned = teachers_stream(readers, list(run.data.train))
    else:
        stream, planned = own_stream(run), steps * part.train.batch
        if live and "teacher" in run.roles:
            planned = steps_of(run, "teacher") * run.config.teacher.train.batch
    model, _ = first_model(run, "student")
    projector = attach(model, live.width, run.config.seed) if live and part.hidden_match else None
    vocab_sizes = [reader.header.vocab_size for reader in readers or []]
    setting = Setting(
        vocab_size=part.model.vocab_size,
        teacher_vocab_size=len(live.unembedding()) if live else max(vocab_sizes, default=part.model.vocab_size),
        corpora=len(run.data.train),
        tokens=steps * part.train.batch * run.config.data.sample_tokens,
        draws=min((float(reader.codec.draws) for reader in readers or []), default=math.inf),
        device=run.dist.device,
    )
    loss = SoftLoss(part, [reader.header.codec.name for reader in readers or []], projector, run.config.engine.debug)
    recipe = StudentRecipe(part, run.dist, setting, steps, list(run.data.train), loss, live)
    feed = _feed(run, stream, Replay(part.replay.order, planned), readers, part.train.batch)
    return Trainer(run, "student", model, recipe, feed, Watch(run.dist), steps), recipe


def _levels(run: Run, readers: list[CacheReader], replay: Replay, batch: int) -> TeacherLevels:
    """The curves of the teachers that a student reads; of one in training, as far as the student's step has waited for
    it. What had ended when the student began is known as a whole; a resumed run keeps what it began with."""
    streams = [reader.header.stream for reader in readers]
    lengths = [int(s["planned"]) // int(s["batch"]) if s else 0 for s in streams]
    paces = [batch / int(s["batch"]) if s else math.nan for s in streams]
    restored = run.restored.state["roles"].get("student") if run.restored else None
    follows = run.config.cache.follow or run.config.job == "codistill"
    live = restored["live"] if restored else follows and not all(reader.finished for reader in readers)
    if not live:
        return TeacherLevels(readers, lengths, paces)
    of_step = int(streams[0]["batch"])
    return TeacherLevels(readers, lengths, paces, lambda step: replay.furthest((step + 1) * batch - 1) // of_step + 1)


def _feed(run: Run, stream: Stream, replay: Replay, readers: list[CacheReader] | None, batch: int) -> Feed:
    on_missing = run.config.cache.on_missing if readers else OnMissing.hard
    levels = _levels(run, readers, replay, batch) if readers else None
    joiner = Joiner(list(run.data.train.values()), readers, on_missing, levels)
    arguments = stream, replay, joiner, batch, run.dist
    if readers and run.config.cache.follow:
        # The tracker does not exist yet: it is opened when everything has been checked.
        return FollowingFeed(readers, run.config.cache, lambda text: run.tracker.message(text), *arguments)
    return Feed(*arguments)
