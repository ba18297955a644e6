"""job=backfill: a frozen teacher labels what the caches lack or hold too stale; forward only, through the same path.

A second corpus that joins the student's mix after the teacher was trained is the everyday case. What is published
carries the teacher's identity and beats what was stale, so that a run that was killed finds it done when it starts
again, here or in another folder.
"""

import math
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from distill.cache import CacheHeader, CacheReader, CacheWriter, is_created, make_codec
from distill.config import stop
from distill.config.errors import DivergenceError
from distill.config.schema import OnFull, OnMissing
from distill.config.units import counted, duration, file_size, short
from distill.data.join import Batch, Joiner, check_cache
from distill.data.packed import PackedCorpus
from distill.data.prefetch import Prefetch
from distill.run.backfill_plan import Held, Plan, Unit, make_plan
from distill.run.caches import cache_entries, cache_folders, new_header
from distill.run.frozen import Teacher, load_teacher
from distill.run.run import Run, as_job
from teacher.capture import Capture
from teacher.labelling import label

PROBED = 256
"""Samples, at most, on which a teacher shows whether it is better than those before it."""


class Place(NamedTuple):
    """One corpus and its cache."""

    name: str
    folder: str | Path
    header: CacheHeader
    """Of the cache that is there, whose codec and seed hold; else of the one that will be made."""
    covered: int
    """Samples that have targets."""
    done: int
    """Of these, samples that this very teacher has labelled."""
    step: int
    """Of the records to be made: later than any that they are to beat, and the same when a run starts again."""
    seen_before: bool
    """The teacher trained on the corpus."""
    flops_per_token: float
    """Of the teacher's forward pass, the tiles of images shared among the tokens."""

    best: float
    """Nats: the least loss of the cache's records; nan: none has one."""
    teacher_loss: float
    """Nats: this teacher's on samples that have records; nan: not measured; inf: it is not finite."""

    @property
    def tflops_per_sample(self) -> float:
        return self.flops_per_token * self.header.sample_tokens / 1e12


class Rate(NamedTuple):
    tokens_per_second: float
    """Of all ranks together, encoding included."""
    bytes_per_token: float


@as_job
def backfill(run: Run) -> None:
    b, dist = run.config.backfill, run.dist
    teacher = load_teacher(run)
    # The main rank's plan holds for all: another rank might read a cache that has grown since.
    places, plan = dist.from_main(_planned(run, teacher) if dist.is_main else None)
    run.start()
    for place in places:
        if math.isinf(place.teacher_loss):
            raise DivergenceError(f"teacher {teacher.name}: its loss on corpus {place.name} is not finite")
    mine = plan.share(dist.rank, dist.world)
    rate = measure(run, teacher, places, mine)
    for line in describe(run, places, plan, teacher, rate):
        run.tracker.message(line)
    entries: dict[str, Any] = {"teacher": teacher.identity, "gaps": plan.gaps}
    entries |= {"stale": plan.samples - plan.gaps, "left_out": plan.left_out}
    if b.dry_run:
        tokens = plan.samples * run.config.data.sample_tokens
        entries |= {
            "dry_run": True,
            "planned_tokens": tokens,
            "planned_tflops": _tflops(places, plan.units),
            "planned_bytes": tokens * rate.bytes_per_token,
            "planned_seconds": tokens / rate.tokens_per_second if tokens else 0.0,
        }
    else:
        entries |= _label_all(run, teacher, places, plan, mine)
        readers = [CacheReader(place.folder) for place in places]
        stats = [reader.stats() for reader in readers]
        entries["coverage"] = sum(s["samples"] for s in stats) / max(sum(place.header.samples for place in places), 1)
        entries |= cache_entries(readers)
    run.finish(entries)


def _planned(run: Run, teacher: Teacher) -> tuple[list[Place], Plan]:
    b = run.config.backfill
    found = list(_places(run, teacher))
    plan = make_plan(
        [held for _, held in found],
        vocab_size=teacher.model.vocab_size,
        flops_per_sample=[place.tflops_per_sample * 1e12 for place, _ in found],
        min_lag=b.min_lag,
        unit_samples=b.unit_samples,
        max_samples=b.max_samples,
        max_flops=None if b.max_tflops is None else b.max_tflops * 1e12,
    )
    return [place for place, _ in found], plan


def _places(run: Run, teacher: Teacher) -> Iterator[tuple[Place, Held]]:
    config, vocab_size = run.config, teacher.model.vocab_size
    wanted = config.backfill.corpora or list(run.data.train)
    for name, folder in cache_folders(run).items():
        if name not in wanted:
            continue
        corpus, newest = run.data.train[name], -1
        seen = corpus.digest in teacher.corpora
        if is_created(folder):
            reader = CacheReader(folder)
            check_cache(reader, run.data.tokenizer, corpus, vocab_size)
            header, held = reader.header, _held(reader, teacher.identity)
            others = [origin for origin in reader.summary if origin.teacher != teacher.identity]
            newest = max((o.last_step for o in others), default=-1)
            seen = seen or any(o.source == "capture" for o in others)
        else:
            header = new_header(run, corpus, vocab_size, {})
            none_N = np.zeros(len(corpus), bool)
            held = Held(none_N, np.full(len(corpus), np.nan), none_N)
        if config.backfill.min_lag is not None:
            held = held._replace(teacher_loss=_own_loss(run, teacher, corpus, held))
        covered, done = int(held.covered_N.sum()), int(held.mine_N.sum())
        flops = teacher.model.flops_per_token(corpus.sample_tokens, corpus.tiles_per_sample)
        step = max(teacher.steps, newest + 1)
        yield Place(name, folder, header, covered, done, step, seen, flops, held.best, held.teacher_loss), held


def _own_loss(run: Run, teacher: Teacher, corpus: PackedCorpus, held: Held) -> float:
    """The teacher's mean label loss on samples that others have labelled, nats: it must not replace better targets."""
    others = np.flatnonzero(held.covered_N & ~held.mine_N)
    ids = others[:: -(-len(others) // PROBED) or 1]
    joiner, b = Joiner([corpus], None, OnMissing.hard), run.config.backfill
    total, tokens = 0.0, 0
    for start in stop.checked(range(0, len(ids), b.batch)):
        some = ids[start : start + b.batch]
        batch = joiner.batch(np.zeros(len(some), np.int64), some).to(run.dist.device)
        loss, valid = label(teacher.model, batch, b.head_chunk).tolist()
        total, tokens = total + loss, tokens + valid
    if not math.isfinite(total):
        return math.inf  # nan means not measured
    return total / tokens if tokens else np.nan


def _held(reader: CacheReader, identity: str) -> Held:
    ids_N = np.arange(reader.header.samples)
    origins_N, origins = reader.origins(ids_N)
    loss = np.array([np.nan if o.loss is None else o.loss for o in origins] + [np.nan])
    mine = np.array([o.teacher == identity for o in origins] + [False])
    return Held(origins_N >= 0, loss[origins_N], mine[origins_N])  # -1, no origin, is the last


def describe(run: Run, places: list[Place], plan: Plan, teacher: Teacher, rate: Rate) -> Iterator[str]:
    """The plan and what it will cost, in lines."""
    yield f"teacher {teacher.identity}: {teacher.name}"
    for number, place in enumerate(places):
        samples = sum(len(unit.sample_ids) for unit in plan.units if unit.corpus == number)
        stale = samples - plan.gaps_C[number]
        yield (
            f"corpus {place.name}: {counted(place.header.samples, 'sample')}, {place.covered:,} have targets "
            f"({place.done:,} by this teacher); to label: {counted(plan.gaps_C[number], 'gap')}, {stale:,} stale, at "
            f"{short(place.flops_per_token)}FLOP a token; into {place.folder} as step {place.step}"
        )
        if not np.isnan(place.teacher_loss):
            yield f"corpus {place.name}: best record {place.best:.3f} nats, this teacher {place.teacher_loss:.3f}"
    tokens = plan.samples * run.config.data.sample_tokens
    if plan.left_out:
        yield f"the budget leaves out {counted(plan.left_out, 'sample')}"
    if plan.samples:
        yield (
            f"{counted(plan.samples, 'sample')} in {counted(len(plan.units), 'unit')}, {short(tokens)} tokens, "
            f"{_tflops(places, plan.units):.4g} TFLOP, about {file_size(tokens * rate.bytes_per_token)}, "
            f"{duration(tokens / rate.tokens_per_second)} at {short(rate.tokens_per_second)} tokens/s"
        )
    else:
        yield "nothing to label"


def _tflops(places: list[Place], units: list[Unit]) -> float:
    return sum(places[unit.corpus].tflops_per_sample * len(unit.sample_ids) for unit in units)


def measure(run: Run, teacher: Teacher, places: list[Place], units: list[Unit]) -> Rate:
    """Speed and size, from the first batch labelled into a cache that is thrown away; collective."""
    speed, size, tokens, loss = 0.0, 0.0, 0, 0.0
    captures: list[Capture] = []
    if units:
        first = units[0]
        place, ids = places[first.corpus], first.sample_ids[: run.config.backfill.batch]
        folder = run.folder / f"measure-{run.dist.rank}.tmp"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            with _capture(run, teacher, place, folder) as capture:
                captures.append(capture)
                for timed in (False, True):  # the first warms up
                    began = time.perf_counter()
                    corpus = run.data.train[place.name]
                    batch = Joiner([corpus], None, OnMissing.hard).batch(np.zeros(len(ids), np.int64), ids)
                    rows, chunk = batch.to(run.dist.device), run.config.backfill.head_chunk
                    loss += float(label(teacher.model, rows, chunk, capture, place.step + timed)[0])
                    capture.flush()
                    speed = batch.ids_BS.numel() / (time.perf_counter() - began)
                stats = capture.writers[0].stats
                size, tokens = stats.bytes / 2, stats.tokens // 2
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    sums = torch.tensor([speed, size, float(tokens), loss], dtype=torch.float64)
    speed, size, counted, loss = run.dist.sum(sums.to(run.dist.device)).tolist()
    _check(run, teacher, loss, captures)
    return Rate(speed, size / max(counted, 1.0))


def _check(run: Run, teacher: Teacher, loss: float, captures: list[Capture]) -> None:
    """Refuses to go on where a loss, of all ranks, is not finite; nothing is published from there on. Collective."""
    if not math.isfinite(loss):
        broken = [capture.broken for capture in captures if capture.broken is not None]
        sample = next((found[0] for found in run.dist.gather(broken) if found), None)
        raise DivergenceError(
            f"teacher {teacher.name}: its log-probabilities of sample {sample} are not finite in precision="
            f"{run.config.precision.name}; what it had labelled before is finite and stays"
        )


@contextmanager
def _capture(run: Run, teacher: Teacher, place: Place, folder: str | Path) -> Iterator[Capture]:
    """The capture of one corpus; publishes nothing more after an exception."""
    with CacheWriter(
        folder,
        place.header,
        writer=f"backfill-{run.dist.rank:05d}",
        counts_V=None if is_created(folder) else run.data.train[place.name].counts_V(teacher.model.vocab_size),
        shard_samples=run.config.cache.shard_samples,
        queue=run.config.cache.queue,
        on_full=OnFull.block,
        source="backfill",
        seen_before=place.seen_before,
        flops_per_token=place.flops_per_token,
        index_every=run.config.cache.index_every,
    ) as writer:
        codec = make_codec(place.header.codec, teacher.model.vocab_size)
        yield Capture(codec, [writer], place.header.seed, teacher.identity, lambda step: teacher.tokens_seen)


def _label_all(run: Run, teacher: Teacher, places: list[Place], plan: Plan, mine: list[Unit]) -> dict[str, Any]:
    """Labels this rank's units, in step with all ranks, so that a row of metrics covers one unit of each."""
    b, dist, length = run.config.backfill, run.dist, run.config.data.sample_tokens
    rounds = -(-len(plan.units) // dist.world)
    pieces = [
        (unit.corpus, unit.sample_ids[start : start + b.batch], start + b.batch >= len(unit.sample_ids))
        for unit in mine
        for start in range(0, len(unit.sample_ids), b.batch)
    ]
    joiners = [Joiner([run.data.train[place.name]], None, OnMissing.hard) for place in places]

    def batch(index: int) -> Batch:
        corpus, ids, _ = pieces[index]
        return joiners[corpus].batch(np.zeros(len(ids), np.int64), ids).pinned(dist.device)

    done = sum(place.done for place in places)
    totals = torch.zeros(2, dtype=torch.float64, device=dist.device)
    with ExitStack() as stack:
        captures = []
        for turn in (True, False):  # the rank that comes first makes the cache
            if dist.is_main is turn:
                captures += [stack.enter_context(_capture(run, teacher, place, place.folder)) for place in places]
            dist.barrier()
        batches = iter(stack.enter_context(Prefetch(batch, 0, len(pieces))))
        run.tracker.progress("backfill", 0, plan.samples, tokens=0)
        at, began, labelled = 0, time.perf_counter(), 0
        for turn_number in range(rounds):
            # Loss, valid tokens, samples, ranks that got a signal.
            sums = torch.zeros(4, dtype=torch.float64, device=dist.device)
            while turn_number < len(mine):
                corpus, ids, last = pieces[at]
                rows = next(batches).to(dist.device)
                sums[:2] += label(teacher.model, rows, b.head_chunk, captures[corpus], places[corpus].step)
                sums[2] += len(ids)
                at += 1
                if last or stop.asked() is not None:
                    break
            sums[3] += stop.asked() is not None
            loss, valid, samples, stopping = dist.sum(sums).tolist()
            _check(run, teacher, loss, captures)
            totals += sums[:2]
            labelled += int(samples)
            seconds, tokens = time.perf_counter() - began, samples * length
            began = time.perf_counter()
            row = {"loss": loss / max(valid, 1.0), "tokens": labelled * length}
            if seconds > 0:
                row["tokens_per_second"] = tokens / seconds
            run.tracker.log("backfill", done + labelled, row)
            text = f"loss {row['loss']:.3f}"
            run.tracker.progress("backfill", labelled, plan.samples, tokens=int(tokens), text=text)
            if stopping:
                break
        for capture in captures:
            capture.flush()
        dist.barrier()  # all shards are published before any rank reads
    stop.check()  # what was labelled is published
    loss, valid = totals.tolist()
    entries: dict[str, Any] = {"samples": labelled, "tokens": labelled * length}
    entries["tflops"] = _tflops(places, plan.units)
    return entries | ({"loss": loss / valid} if valid else {})
