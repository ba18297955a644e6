"""Wiring: from a run to a trainer with its stream, its cache and its step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distill.cache import CacheHeader, CacheReader, CacheWriter, is_written, make_codec
from distill.config.errors import ConfigError
from distill.config.schema import OnMissing, Parametrization, ReplayOrder, TrainConfig
from distill.data.join import Joiner, check_cache
from distill.data.packed import PackedCorpus
from distill.data.stream import Stream, replay
from distill.engine.watch import Watch
from distill.model.count import flops_per_token
from distill.run.identity import Lineage, lineage
from distill.run.run import Run, architecture
from distill.run.trainer import Positions, Step, Trainer
from distill.tools.flops import flop_ledger
from distill.tracking.meters import Meters
from student.distilling import StudentStep
from teacher.capture import Capture
from teacher.pretraining import TeacherStep


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


def cache_root(run: Run) -> str:
    """A path, or a URL of a file system that fsspec knows."""
    return run.config.cache.dir or str(run.folder / "cache")


def cache_folders(run: Run) -> dict[str, str]:
    """The cache of each corpus: as `cache.dirs` says, else the root itself, or a folder in it for each of a mixture."""
    root, names = cache_root(run).rstrip("/"), list(run.data.train)
    usual = {names[0]: root} if len(names) == 1 else {name: f"{root}/{name}" for name in names}
    return {name: run.config.cache.dirs.get(name, folder) for name, folder in usual.items()}


def own_stream(run: Run) -> Stream:
    """Of the run's corpora by their weights and data.seed."""
    sizes = {name: len(corpus) for name, corpus in run.data.train.items()}
    weights = {name: run.config.data.corpora[name].weight for name in sizes}
    return Stream(sizes, weights, run.config.data.seed)


def teacher(run: Run) -> tuple[Trainer, Capture | None]:
    part, steps = run.config.teacher, steps_of(run, "teacher")
    stream, batch = own_stream(run), part.train.batch
    planned = {**stream.describe(), "planned": steps * batch, "batch": batch, "writers": run.dist.world}
    # A resumed run stays who it was.
    known = run.lineages.get("teacher") or lineage_of(run, steps, stream)
    run.lineages["teacher"] = known
    watch = Watch(run.dist)
    capture = open_capture(run, planned, cache_folders(run), known.base, watch) if part.capture else None
    step = TeacherStep(Meters(run.dist.device), part.train.head_chunk, capture)
    positions = replay(ReplayOrder.same, steps * batch)
    return _trainer(run, "teacher", step, steps, stream, positions, None, watch), capture


def lineage_of(run: Run, steps: int, stream: Stream) -> Lineage:
    """Of the run's teacher, as it starts. Collective."""
    part = run.config.teacher
    like = architecture(part.model) | {"parametrization": part.model.parametrization}
    if part.model.parametrization is Parametrization.transfer:
        like["base"] = dataclasses.asdict(part.model.base)
    start, corpora = run.first_weights("teacher"), run.data.train
    return lineage(start, like, part.optim, part.train, steps, run.config.precision, stream, corpora)


def open_capture(
    run: Run,
    planned: dict[str, object],
    folders: Mapping[str, str | Path],
    teacher: str,
    watch: Watch | None = None,
) -> Capture:
    """One writer per corpus on every rank; the rank that comes first creates the cache.

    teacher: its identity.

    A cache that holds another run's targets is refused: they would give way to this run's, sample by sample.
    """
    config, train = run.config, run.config.teacher.train
    taken = [folder for folder in folders.values() if not config.resume and is_written(folder)]
    run.dist.barrier()
    if taken:
        raise ConfigError(
            f"cache.dir is {taken[0]}; it holds targets of another run: choose another folder, or go on with that run "
            "(its hydra.run.dir and resume=true)"
        )
    vocab_size = config.teacher.model.vocab_size
    writers = []
    for turn in (True, False):
        if run.dist.is_main is turn:
            for name, folder in folders.items():
                corpus = run.data.train[name]
                header = new_header(run, corpus, vocab_size, planned)
                writers.append(
                    CacheWriter(
                        folder,
                        header,
                        writer=f"teacher-{run.dist.rank:05d}",
                        counts_V=corpus.counts_V(vocab_size),
                        shard_samples=config.cache.shard_samples,
                        queue=config.cache.queue,
                        on_full=config.cache.on_full,
                        flops_per_token=flops_per_token(
                            config.teacher.model, corpus.sample_tokens, corpus.tiles_per_sample
                        ),
                    )
                )
                run.resources.push(writers[-1])
        run.dist.barrier()
    tokens = train.batch * config.data.sample_tokens
    return Capture(make_codec(config.cache.codec, vocab_size), writers, config.seed, teacher, tokens, watch)


def new_header(run: Run, corpus: PackedCorpus, vocab_size: int, stream: dict[str, object]) -> CacheHeader:
    """Of the cache of a corpus, as this run would make it; stream: the teacher's plan, empty where none trains."""
    return CacheHeader(
        vocab_size=vocab_size,
        tokenizer=run.data.tokenizer.digest,
        corpus=corpus.digest,
        sample_tokens=corpus.sample_tokens,
        samples=len(corpus),
        codec=run.config.cache.codec,
        seed=run.config.seed,
        stream=stream,
    )


def cache_figures(readers: list[CacheReader]) -> dict[str, Any]:
    """What a summary says of the caches of a run: bytes of all published shards per token with a target in them, and
    the ledger of floating-point operations."""
    stats = [reader.stats() for reader in readers]
    ledger = flop_ledger((row for reader in readers for row in reader.rows), readers[0].header.sample_tokens)
    return {
        "bytes_per_token": sum(s["bytes"] for s in stats) / max(sum(s["tokens"] for s in stats), 1),
        "flops": {name: value for name, value in ledger.items() if value},
    }


def open_readers(run: Run, role: str = "student") -> list[CacheReader]:
    """The caches of all corpora, checked against the run's own tokenizer, vocabulary, packing and corpus.

    role: whose vocabulary.

    A student that goes on from a checkpoint finds the view that it had: what was published since waits for a refresh.
    """
    roles = run.restored.state["roles"] if run.restored else {}
    views = roles.get("student", {}).get("views", [])
    readers = []
    for number, (name, folder) in enumerate(cache_folders(run).items()):
        reader = CacheReader(folder, views[number] if views else None)
        vocab_size = getattr(run.config, role).model.vocab_size
        check_cache(reader, run.data.tokenizer, run.data.train[name], vocab_size, student=True)
        reader.read(np.empty(0, np.int64), np.empty(0, np.uint64))  # loads the compiled decoder before the first step
        readers.append(reader)
    return readers


def student(run: Run, readers: list[CacheReader] | None) -> Trainer:
    """A student on the teacher's stream as the cache records it, or (no cache, or order=own) on its own."""
    part, steps = run.config.student, steps_of(run, "student")
    sizes = {name: len(corpus) for name, corpus in run.data.train.items()}
    if readers and part.replay.order is not ReplayOrder.own:
        stream, planned = teachers_stream(readers, list(sizes))
    else:
        stream, planned = own_stream(run), steps * part.train.batch
    meters, vocab_size = Meters(run.dist.device), part.model.vocab_size
    taught = max((reader.header.vocab_size for reader in readers or []), default=None)
    step = StudentStep(meters, part.train.head_chunk, part.weighting, vocab_size, steps, len(sizes), taught)
    positions = replay(part.replay.order, planned)
    return _trainer(run, "student", step, steps, stream, positions, readers, Watch(run.dist))


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


def _trainer(
    run: Run,
    role: str,
    step: Step,
    steps: int,
    stream: Stream,
    positions: Positions,
    readers: list[CacheReader] | None,
    watch: Watch,
) -> Trainer:
    part = getattr(run.config, role)
    on_missing = run.config.cache.on_missing if readers else OnMissing.hard
    return Trainer(
        role,
        run.engine(role),
        step,
        part.train,
        part.optim,
        steps,
        stream,
        positions,
        Joiner(list(run.data.train.values()), readers, on_missing),
        run.config.data.sample_tokens,
        run.tracker,
        run.dist,
        lambda model: run.glance(model, part.train),
        watch,
        lambda what: run.diverged(role, what),
    )
