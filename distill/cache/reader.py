"""Random access to a cache by sample id, while writers append."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.cache import record
from distill.cache.codecs import make_codec
from distill.cache.format import SHARDS
from distill.cache.header import CacheHeader
from distill.cache.ledger import LedgerReader, Origin, Retired, ShardRow, ledgers, outside
from distill.cache.open_store import open_store
from distill.cache.ranks import load_ranks
from distill.cache.record import Decoded
from distill.cache.shard import Shard
from distill.cache.targets import SoftTargets
from distill.cache.view import View, open_shard
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


class CacheReader:
    """Looks up soft targets by sample id and verifies token digests.

    A reader has a view of the cache: what was published at its last `refresh`. Any number of readers may follow any
    number of writers.

    Args:
        folder: a path, or a URL of a file system of fsspec.
        view: number of rows of each ledger that the view begins with, from another reader's `view`; None: all that are
            published. `refresh` adds those published later.
    """

    def __init__(self, folder: str | Path, view: Mapping[str, int] | None = None):
        """Raises CacheError: no cache, an unknown format or codec, a damaged header, rank table, ledger or index."""
        self.folder = folder
        self._store = open_store(folder)
        self.header = CacheHeader.load(self._store)
        self.codec = make_codec(self.header.codec, self.header.vocab_size)
        self._ids_by_rank = load_ranks(self._store, self.header).astype(np.int32)
        self._ledgers: dict[str, LedgerReader] = {}
        self._new: list[ShardRow | Retired] = []
        """Entries of the ledgers that are not part of the view yet."""
        self._rows_read: dict[str, int] = {}
        self._retired: list[Retired] = []
        self._view = View(self._store, self.header)
        if view is None:
            self.refresh()
        else:
            self._open_view(view)

    def __reduce__(self) -> tuple[type[CacheReader], tuple[str | Path, dict[str, int]]]:
        """A pickled reader is opened anew, with the same view, in a worker process."""
        return CacheReader, (self.folder, self.view)

    def refresh(self) -> int:
        """Adds what has been published since to the view; returns the number of new shards.

        Raises:
            CacheError: a damaged ledger or shard. The view stays what it was, and the next call fails again.
        """
        for name in ledgers(self._store):
            self._new += self._ledger(name).poll()
        return self._take_in()

    @property
    def view(self) -> dict[str, int]:
        """Number of rows of each ledger in the view; `CacheReader(folder, view)` has the same view."""
        return dict(self._rows_read)

    @property
    def rows(self) -> list[ShardRow]:
        """The shards of the view, in no particular order; those that a compaction has replaced are not among them."""
        return list(self._view.rows)

    @property
    def torn(self) -> list[str]:
        """Writers whose ledger ends in a row that is not complete."""
        return [name for name, ledger in self._ledgers.items() if ledger.torn]

    @property
    def finished(self) -> bool:
        """Whether there are ledgers of teachers in training, and all of them are marked as complete."""
        teachers = self._teachers()
        return bool(teachers) and all(ledger.finished for ledger in teachers)

    def frontier(self, writers: int) -> int | None:
        """The teacher's step before which everything is published or left out for good; None: all of it.

        writers: how many the teacher has; one that has not published yet holds the frontier at 0.
        """
        teachers = self._teachers()
        if len(teachers) < writers:
            return 0
        # Samples of a writer's last step may still be in its next shard.
        return min((max(ledger.last_step, 0) for ledger in teachers if not ledger.finished), default=None)

    def covers(self, sample_ids: Array) -> NDArray[np.bool_]:
        """For each sample id, whether there are targets; CacheError for an id that the corpus does not have."""
        covered: NDArray[np.bool_] = self.steps(sample_ids) >= 0
        return covered

    def steps(self, sample_ids: Array) -> NDArray[np.int64]:
        """For each sample id, the teacher's step when it made the targets, -1 where there are none; CacheError for an
        id that the corpus does not have."""
        return self._view.newest.steps(self._checked(sample_ids))

    def origins(self, sample_ids: Array) -> tuple[NDArray[np.int64], list[Origin]]:
        """For each sample id, which of the returned origins its newest record has; -1: there is no record."""
        view, sample_ids = self._view, self._checked(sample_ids)
        numbers, origins = np.full(len(sample_ids), -1, np.int64), list[Origin]()
        for group in view.groups(sample_ids):
            shard = view.open(group.number)
            numbers[group.indexes] = len(origins) + shard.columns.origins[group.places]
            origins += shard.row.origins
        return numbers, origins

    def digests(self, sample_ids: Array) -> NDArray[np.uint64]:
        """For each sample id, the digest of the tokens that the teacher saw; 0 where there is no record."""
        view, sample_ids = self._view, self._checked(sample_ids)
        digests = np.zeros(len(sample_ids), np.uint64)
        for group in view.groups(sample_ids):
            digests[group.indexes] = view.open(group.number).columns.digests[group.places]
        return digests

    def read(self, sample_ids_B: Array, digests_B: Array) -> ReadResult:
        """Targets of a batch.

        digests_B: uint64 digests of the batch's own tokens, compared with those of the tokens that the teacher saw.

        Raises:
            CacheError: a digest that differs, or damaged bytes; names cache or file, and sample.
        """
        records = self.records(sample_ids_B)
        for each, digest in zip(records, np.asarray(digests_B, np.uint64).tolist(), strict=True):
            if each is not None and each.digest != digest:
                raise CacheError(
                    f"cache {self.folder}: sample {each.sample_id} has digest {each.digest:016x} in the cache, "
                    f"{digest:016x} in this batch: the tokens are not those the teacher saw"
                )
        there = [each for each in records if each is not None]
        decoded = self.decode(there)
        targets = SoftTargets(
            *self.codec.decode(decoded.atoms), decoded.valid_T, decoded.label_logprob_T, decoded.entropy_T
        )
        if len(there) < len(records):
            covered_B = torch.tensor([each is not None for each in records])
            targets = _scatter(targets, covered_B.repeat_interleave(self.header.sample_tokens))
        losses = [None if each is None else each.origin.loss for each in records]
        return ReadResult(
            targets,
            torch.tensor([math.nan if loss is None else loss for loss in losses], dtype=torch.float32),
            torch.tensor([-1 if each is None else each.step for each in records], dtype=torch.int64),
        )

    def samples(self) -> Iterator[Sample]:
        """The newest record of every sample that has one, verified, shard after shard."""
        view = self._view
        for number, row in enumerate(list(view.rows)):
            shard = open_shard(self._store, self.header, row)
            yield from _samples(shard, view.newest.of(number, shard.columns.sample_ids))

    def records(self, sample_ids: Array) -> list[Sample | None]:
        """The newest record of each sample, verified; None where there is none."""
        view, sample_ids = self._view, self._checked(sample_ids)
        groups = list(view.groups(sample_ids))
        parts = self._store.map(lambda group: _samples(view.open(group.number), group.places), groups)
        records: list[Sample | None] = [None] * len(sample_ids)
        for group, part in zip(groups, parts, strict=True):
            for index, sample in zip(group.indexes.tolist(), part, strict=True):
                records[index] = sample
        return records

    def decode(self, samples: Sequence[Sample]) -> Decoded:
        """Atoms and statistics of the records of any samples; CacheError if one is not what a writer writes."""
        raws = [record.Raw(sample.data, sample.atoms) for sample in samples]
        try:
            return record.decode(raws, self.header.sample_tokens, self._ids_by_rank, self.codec)
        except ValueError as error:
            bad = samples[error.args[0]]
            path = self._store.path(f"{SHARDS}/{bad.shard}")
            raise CacheError(f"{path} is damaged: sample {bad.sample_id} is not a record") from error

    def stats(self) -> dict[str, Any]:
        """Plain numbers, and arrays by origin in the order of steps.

        Each sample counts once; bytes and atoms are those of all published shards per token in them, so that tokens
        which are stored twice count twice.
        """
        rows = self.rows
        origins = sorted((o for row in rows for o in row.origins), key=lambda origin: origin.last_step)
        tokens, covered = sum(row.tokens for row in rows), self._view.newest.covered
        return {
            "samples": covered,
            "coverage": covered / max(self.header.samples, 1),
            "shards": len(rows),
            "tokens": tokens,
            "bytes": sum(row.bytes for row in rows),
            "bytes_per_token": sum(row.bytes for row in rows) / max(tokens, 1),
            "atoms_per_token": sum(row.atoms for row in rows) / max(tokens, 1),
            "step": np.array([origin.last_step for origin in origins], np.int64),
            "loss": np.array([np.nan if origin.loss is None else origin.loss for origin in origins], np.float64),
        }

    # ------------------------------------------------------------ the view

    def _ledger(self, name: str) -> LedgerReader:
        if name not in self._ledgers:
            self._ledgers[name] = LedgerReader(self._store, name, self.header.identity)
        return self._ledgers[name]

    def _open_view(self, view: Mapping[str, int]) -> None:
        for name, rows in view.items():
            ledger = self._ledger(name)
            if rows:
                self._new += ledger.poll(rows)
            if ledger.seq < rows:
                raise CacheError(
                    f"cache {self.folder}: ledger {name} has {ledger.seq} rows, {rows} when its view was taken"
                )
        self._take_in()

    def _take_in(self) -> int:
        """`_new` into the view, at one stroke: an error leaves everything as it was."""
        retired = self._retired + [each for each in self._new if isinstance(each, Retired)]
        rows = outside([each for each in self._new if isinstance(each, ShardRow)], retired)
        view, left = self._view, outside(self._view.rows, retired)
        if len(left) < len(view.rows):  # a compaction has replaced shards of the view: begin anew without them
            rows = left + rows
            view = View(self._store, self.header)
        view.add(rows)
        self._view, self._retired, self._new = view, retired, []
        self._rows_read = {name: ledger.seq for name, ledger in self._ledgers.items()}
        return len(rows)

    def _teachers(self) -> list[LedgerReader]:
        """Ledgers of teachers in training; a ledger without rows may become one of any source."""
        return [ledger for ledger in self._ledgers.values() if ledger.captures and ledger.seq]

    def _checked(self, sample_ids: Array) -> Array:
        sample_ids = np.asarray(sample_ids)
        if len(sample_ids) and not 0 <= sample_ids.min() <= sample_ids.max() < self.header.samples:
            raise CacheError(f"cache {self.folder}: sample ids must lie in 0 to {self.header.samples - 1}")
        return sample_ids


def _samples(shard: Shard, places: Array) -> list[Sample]:
    """The records at these places of a shard, verified."""
    columns = shard.columns.take(places)
    return [
        Sample(
            int(columns.sample_ids[i]),
            int(columns.digests[i]),
            int(columns.steps[i]),
            shard.row.origins[columns.origins[i]],
            data,
            int(columns.atoms[i]),
            shard.row.shard,
        )
        for i, data in enumerate(shard.records(places))
    ]


def _scatter(targets: SoftTargets, covered_T: Tensor) -> SoftTargets:
    """Puts the rows of covered samples in their places among zeros."""

    def spread(rows: Tensor) -> Tensor:
        return rows.new_zeros(len(covered_T), *rows.shape[1:]).index_put_((covered_T,), rows)

    return SoftTargets(*map(spread, targets))
