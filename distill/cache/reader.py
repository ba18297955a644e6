"""Random access to a cache by sample id, while writers append."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.cache import record
from distill.cache.codecs import make_codec
from distill.cache.header import CacheHeader
from distill.cache.loss_curve import LossSums
from distill.cache.open_store import open_store
from distill.cache.origins import SOURCES, Origin
from distill.cache.put_check import known_ids, whole_numbers
from distill.cache.ranks import load_ranks
from distill.cache.record import Decoded
from distill.cache.shard import Shard
from distill.cache.snapshot import StreamState
from distill.cache.targets import SoftTargets
from distill.cache.view import Records, View, asked, open_view, refreshed
from distill.config.errors import CacheError

Array = NDArray[Any]


class ReadResult(NamedTuple):
    """Targets of a batch of B samples."""

    targets: SoftTargets
    """Of T = B * S tokens, sample after sample."""
    shard_loss_B: Tensor
    """float32 nats: the teacher's mean label loss on the sample's shard when captured; nan where not covered."""
    step_B: Tensor
    """int64: the teacher's step when it made the targets; -1 where not covered."""
    teacher_B: Tensor
    """int64: which of `teachers` made them; -1 where not covered."""
    teachers: tuple[tuple[str, str], ...]
    """Identity and source (capture, backfill or import) of each teacher of the batch, once."""


class Sample(NamedTuple):
    """One record as it lies in the cache, verified."""

    sample_id: int
    digest: int
    """xxh3-64 of the tokens that the teacher saw."""
    step: int
    origin: Origin
    data: bytes
    atoms: int
    shard: str
    """Name of the shard's file in the cache's folder."""


class CacheReader:
    """Looks up soft targets by sample id and verifies token digests.

    A reader has a view of the cache: what was published at its last `refresh`. Any number of readers may follow any
    number of writers. A reader may be used by several threads, in children of a fork, and pickled.

    Args:
        folder: a path, or a URL of a file system of fsspec.
        view: the view to begin with, from another reader's `view`; None: all that is published. `refresh` adds what is
            published later.
    """

    def __init__(self, folder: str | Path, view: Mapping[str, Any] | None = None):
        """Raises CacheError: no cache, an unknown format or codec, a damaged header, rank table or shard."""
        self.folder = folder
        self._store = open_store(folder)
        self.header = CacheHeader.load(self._store)
        self.codec = make_codec(self.header.codec, self.header.vocab_size)
        self._ids_by_rank = load_ranks(self._store, self.header).astype(np.int32)
        self._view = open_view(self._store, self.header, view)

    def __reduce__(self) -> tuple[type[CacheReader], tuple[str, dict[str, Any]]]:
        """A pickled reader is opened anew, with the same view, in a process that may have another working folder."""
        return CacheReader, (self._store.place, self.view)

    def refresh(self) -> int:
        """Adds what has been published since to the view; returns the number of new shards and marks.

        Raises:
            CacheError: a damaged shard. The view stays what it was, and the next call fails again.
        """
        before = self._view
        view = refreshed(before)
        self._take(before, view)
        old = {name: state.count for name, state in before.streams.items()}
        return sum(max(state.count - old.get(name, 0), 0) for name, state in view.streams.items())

    def _take(self, before: View, view: View) -> None:
        """Takes another view, unless another thread has taken one meanwhile, which may be newer."""
        if self._view is before:
            self._view = view

    @property
    def view(self) -> dict[str, Any]:
        """The view as JSON: number of its snapshot, and how many shards of each writer it has; `CacheReader(folder,
        view)` has the same view."""
        return self._view.pin

    @property
    def summary(self) -> list[Origin]:
        """Origins of all shards of the view, summed by teacher and source."""
        return self._view.summary

    @property
    def losses(self) -> LossSums:
        """Label losses by teacher, source and step, of all that was ever published: `reader.losses.curve(teacher)`."""
        return self._view.losses

    @property
    def finished(self) -> bool:
        """Whether there are streams of teachers in training, and all of them are marked as complete."""
        teachers = self._teachers()
        return bool(teachers) and all(state.finished for state in teachers)

    @property
    def frontier(self) -> int | None:
        """The teacher's step before which everything is published or left out for good; None: all of it.

        Every writer of a teacher marks the beginning of its stream before any of them publishes targets, so one that
        has published none yet holds the frontier back, too.
        """
        teachers = self._teachers()
        if not teachers:
            return 0
        # Samples of a writer's last step may still be in its next shard.
        return min((max(state.step, 0) for state in teachers if not state.finished), default=None)

    @property
    def open_streams(self) -> dict[str, StreamState]:
        """Streams of teachers in training that are not marked as complete, by writer."""
        streams = self._view.streams.items()
        return {name: state for name, state in streams if state.source == "capture" and not state.finished}

    def _teachers(self) -> list[StreamState]:
        return [state for state in self._view.streams.values() if state.source == "capture"]

    def covers(self, sample_ids: Array) -> NDArray[np.bool_]:
        """For each sample id, whether there are targets; CacheError for an id that the corpus does not have."""
        return self._find(sample_ids)[1].there

    def steps(self, sample_ids: Array) -> NDArray[np.int64]:
        """For each sample id, the teacher's step when it made the targets, -1 where there are none; CacheError for an
        id that the corpus does not have."""
        return self._find(sample_ids)[1].steps

    def origins(self, sample_ids: Array) -> tuple[NDArray[np.int64], list[Origin]]:
        """For each sample id, which of the returned origins its newest record has; -1: there is no record."""
        view, records = self._find(sample_ids)
        numbers, origins = np.full(len(records.entries), -1, np.int64), list[Origin]()
        there = np.flatnonzero(records.there)
        keys = np.stack([records.tables[there], records.entries["origin"][there].astype(np.int64)], axis=1)
        each, first, of = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        for (table, _), i in zip(each.tolist(), first.tolist(), strict=True):
            origins.append(view.names(table).origin(records.rows[there[i]]))
        numbers[there] = of.reshape(-1)
        return numbers, origins

    def digests(self, sample_ids: Array) -> NDArray[np.uint64]:
        """For each sample id, the digest of the tokens that the teacher saw; 0 where there is no record."""
        records = self._find(sample_ids)[1]
        return np.where(records.there, records.entries["digest"], np.uint64(0))

    def read(self, sample_ids_B: Array, digests_B: Array) -> ReadResult:
        """Targets of a batch.

        digests_B: uint64, of the tokens of the batch's samples, which must be those that the teacher saw.

        Raises:
            CacheError: a digest that differs, or damaged bytes; names cache or file, and sample.
        """
        view, found = self._find(sample_ids_B)
        wanted = self._whole("digests_B", digests_B)
        if wanted.shape != found.there.shape:
            raise CacheError(f"cache {self.folder}: {len(wanted)} digests of {len(found.there)} samples")
        wanted = wanted.astype(np.uint64)
        for i in np.flatnonzero(found.there & (found.entries["digest"] != wanted)).tolist():
            raise CacheError(
                f"cache {self.folder}: sample {found.entries['sample'][i]} has digest "
                f"{int(found.entries['digest'][i]):016x} in the cache, {int(wanted[i]):016x} in this batch: the tokens "
                "are not those the teacher saw"
            )
        there = [each for each in self._samples(view, found) if each is not None]
        decoded = self.decode(there)
        targets = SoftTargets(
            *self.codec.decode(decoded.atoms), decoded.valid_T, decoded.label_logprob_T, decoded.entropy_T
        )
        if len(there) < len(found.entries):
            targets = _scatter(targets, torch.from_numpy(found.there).repeat_interleave(self.header.sample_tokens))
        loss_B = np.where(found.there, found.rows["loss"], np.nan).astype(np.float32)
        teacher_B, teachers = _teachers(view, found)
        return ReadResult(targets, torch.from_numpy(loss_B), torch.from_numpy(found.steps), teacher_B, teachers)

    def samples(self) -> Iterator[Sample]:
        """The newest record of every sample that has one, verified, shard after shard."""
        view, (names, rows) = asked(self._view, View.origins)
        for row in rows[rows["number"] == 0]:
            shard = Shard(self._store, self.header, *names.shard(row))
            view, found = asked(view, partial(View.find, sample_ids=shard.columns.sample_ids))
            yield from self._samples(view, found.take(view.of_shard(found, shard)))  # type: ignore[misc]

    def records(self, sample_ids: Array) -> list[Sample | None]:
        """The newest record of each sample, verified; None where there is none."""
        return self._samples(*self._find(sample_ids))

    def decode(self, samples: Sequence[Sample]) -> Decoded:
        """Atoms and statistics of the records of any samples; CacheError if one is not what a writer writes."""
        raws = [record.Raw(sample.data, sample.atoms) for sample in samples]
        try:
            return record.decode(raws, self.header.sample_tokens, self._ids_by_rank, self.codec)
        except ValueError as error:
            bad = samples[error.args[0]]
            path = self._store.path(bad.shard)
            raise CacheError(f"{path} is damaged: sample {bad.sample_id} is not a record") from error

    def stats(self) -> dict[str, Any]:
        """Plain numbers, and arrays by origin in the order of steps.

        Each sample counts once; bytes and atoms are those of all published shards per token in them, so that tokens
        which are stored twice count twice.
        """
        view, ((_, rows), covered) = asked(self._view, lambda each: (each.origins(), each.covered))
        rows, totals = rows[np.argsort(rows["last_step"], kind="stable")], view.totals
        return {
            "samples": covered,
            "coverage": covered / max(self.header.samples, 1),
            "shards": totals.shards,
            "tokens": totals.tokens,
            "bytes": totals.bytes,
            "bytes_per_token": totals.bytes / max(totals.tokens, 1),
            "atoms_per_token": totals.atoms / max(totals.tokens, 1),
            "step": rows["last_step"].astype(np.int64),
            "loss": rows["loss"].astype(np.float64),
        }

    # ------------------------------------------------------------ looking up

    def _find(self, sample_ids: Array) -> tuple[View, Records]:
        """The view, and in it the records of samples; CacheError for an id that the corpus does not have."""
        sample_ids = known_ids(self._whole("sample_ids", sample_ids), self.header)
        before = self._view
        view, records = asked(before, partial(View.find, sample_ids=sample_ids))
        self._take(before, view)
        return view, records

    def _whole(self, name: str, values: Any) -> Array:
        try:
            return whole_numbers(values)
        except ValueError as error:
            raise CacheError(f"cache {self.folder}: {name} {error}") from None

    def _samples(self, view: View, found: Records) -> list[Sample | None]:
        """Records with their bytes, verified; None where there is none."""
        samples: list[Sample | None] = []
        for i, data in enumerate(view.read(found)):
            if data is None:
                samples.append(None)
                continue
            entry, row, table = found.entries[i], found.rows[i], int(found.tables[i])
            origin = view.names(table).origin(row)
            samples.append(
                Sample(
                    int(entry["sample"]), int(entry["digest"]), int(entry["step"]), origin, data, int(entry["atoms"]),
                    view.file(table, row),
                )
            )  # fmt: skip
        return samples


def _teachers(view: View, found: Records) -> tuple[Tensor, tuple[tuple[str, str], ...]]:
    """Which of the returned teachers and sources made each record; -1 where there is none."""
    places = dict[tuple[str, str], int]()
    numbers = np.full(len(found.tables), -1, np.int64)
    columns = found.tables, found.rows["teacher"], found.rows["source"]
    for i, (table, teacher, source) in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        if table >= 0:
            numbers[i] = places.setdefault((view.names(table).teachers[teacher], SOURCES[source]), len(places))
    return torch.from_numpy(numbers), tuple(places)


def _scatter(targets: SoftTargets, covered_T: Tensor) -> SoftTargets:
    """Puts the rows of covered samples in their places among zeros."""

    def spread(rows: Tensor) -> Tensor:
        return rows.new_zeros(len(covered_T), *rows.shape[1:]).index_put_((covered_T,), rows)

    return SoftTargets(*map(spread, targets))
