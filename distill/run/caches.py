"""The caches of a run's corpora: where they lie, and how they are created, opened and summarized."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distill.cache import CacheHeader, CacheReader, CacheWriter, is_created, is_written, make_codec
from distill.cache.snapshot import StreamState
from distill.config.errors import ConfigError
from distill.data.join import check_cache
from distill.data.packed import PackedCorpus
from distill.engine.watch import Watch
from distill.model.count import flops_per_token
from distill.run.run import Run
from distill.tools.flops import flop_ledger
from teacher.capture import Capture


def cache_root(run: Run) -> str:
    """A path, or a URL of a file system that fsspec supports."""
    return run.config.cache.dir or str(run.folder / "cache")


def cache_folders(run: Run) -> dict[str, str]:
    """The cache of each corpus: the folder in `cache.dirs`, else the root, or a folder in it for each of a mixture."""
    root, names = cache_root(run).rstrip("/"), list(run.config.data.corpora)
    usual = {names[0]: root} if len(names) == 1 else {name: f"{root}/{name}" for name in names}
    return {name: run.config.cache.dirs.get(name, folder) for name, folder in usual.items()}


def open_capture(
    run: Run,
    planned: dict[str, object],
    folders: Mapping[str, str | Path],
    teacher: str,
    watch: Watch | None = None,
) -> Capture:
    """One writer per corpus on every rank; the rank that comes first creates the cache.

    Args:
        planned: the teacher's stream, for the header of a cache that is made.
        teacher: its identity.

    Raises:
        ConfigError: a cache holds another run's targets, which would give way to this run's, sample by sample.
    """
    config = run.config
    taken = [folder for folder in folders.values() if not config.resume and is_written(folder)]
    before = _open_streams(folders) if config.resume else {}
    run.dist.barrier()
    if taken:
        raise ConfigError(
            f"cache.dir is {taken[0]}; it holds targets of another run: choose another folder, or go on with that run "
            "(its hydra.run.dir and resume=true)"
        )
    writers: list[CacheWriter] = []
    for turn in (True, False):
        if run.dist.is_main is turn:
            for name, folder in folders.items():
                writers.append(_open_writer(run, run.data.train[name], folder, planned, before.get(name, {})))
                run.resources.push(writers[-1])
        run.dist.barrier()
    mine = _writer_names(run.dist.world)
    for name, streams in before.items() if run.dist.is_main else ():
        for writer in streams.keys() - {*mine}:  # of ranks that are not there any more; all that are have begun anew
            with CacheWriter(folders[name], CacheHeader.load(folders[name]), writer=writer) as left:
                left.finish()
    tokens = config.teacher.train.batch * config.data.sample_tokens  # a step
    codec = make_codec(config.cache.codec, config.teacher.model.vocab_size)
    return Capture(codec, writers, config.seed, teacher, lambda step: step * tokens, watch)


def _open_streams(folders: Mapping[str, str | Path]) -> dict[str, dict[str, StreamState]]:
    """The streams of a teacher's ranks that are not complete, in the cache of each corpus."""
    return {name: CacheReader(folder).open_streams for name, folder in folders.items() if is_created(folder)}


def _writer_names(world: int) -> list[str]:
    return [f"teacher-{rank:05d}" for rank in range(world)]


def _open_writer(
    run: Run, corpus: PackedCorpus, folder: str | Path, planned: dict[str, object], before: dict[str, StreamState]
) -> CacheWriter:
    """This rank's writer; before: the streams that the resumed run had begun, on this number of ranks or another."""
    model, cache, names = run.config.teacher.model, run.config.cache, _writer_names(run.dist.world)
    step = run.restored.state["roles"]["teacher"]["step"] if run.restored else 0
    return CacheWriter(
        folder,
        new_header(run, corpus, model.vocab_size, planned),
        writer=names[run.dist.rank],
        counts_V=corpus.counts_V(model.vocab_size),
        shard_samples=cache.shard_samples,
        queue=cache.queue,
        on_full=cache.on_full,
        flops_per_token=flops_per_token(model, corpus.sample_tokens, corpus.tiles_per_sample),
        index_every=cache.index_every,
        # What these ranks have not published yet may be of any step from the last that each stream has on.
        first_step=min([step, *(state.step for state in before.values())]),
        is_restart=bool(before) and sorted(before) != names,
    )


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


def open_readers(run: Run, role: str = "student") -> list[CacheReader]:
    """The caches of all corpora, checked against the run's own tokenizer, vocabulary, packing and corpus.

    A student that goes on from a checkpoint gets the view that it had: what was published since waits for a refresh.
    All ranks have the main one's, whenever they looked.

    Args:
        role: whose vocabulary.
    """
    roles = run.restored.state["roles"] if run.restored else {}
    views = roles.get("student", {}).get("views", [])
    vocab_size = getattr(run.config, role).model.vocab_size
    readers = []
    for number, (name, folder) in enumerate(cache_folders(run).items()):
        reader = CacheReader(folder, views[number] if views else None)
        if (view := run.dist.from_main(reader.view)) != reader.view:
            reader = CacheReader(folder, view)
        check_cache(reader, run.data.tokenizer, run.data.train[name], vocab_size, student=True)
        reader.read(np.empty(0, np.int64), np.empty(0, np.uint64))  # loads the compiled decoder before the first step
        readers.append(reader)
    return readers


def cache_entries(readers: list[CacheReader]) -> dict[str, Any]:
    """Summary entries of a run's caches: bytes of all published shards per token with a target in them, and the ledger
    of floating-point operations."""
    stats = [reader.stats() for reader in readers]
    ledger = flop_ledger((origin for reader in readers for origin in reader.summary), readers[0].header.sample_tokens)
    return {
        "bytes_per_token": sum(s["bytes"] for s in stats) / max(sum(s["tokens"] for s in stats), 1),
        "flops": {name: value for name, value in ledger.items() if value},
    }
