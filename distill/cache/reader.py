"""Random access to a cache by sample id, while writers append."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.cache import record
from distill.cache.codecs import make_codec
from distill.cache.header import CacheHeader
from distill.cache.index import Index
from distill.cache.ledger import LedgerReader, Origin, Retired, ShardRow, ledgers, outside
from distill.cache.ranks import load_ranks
from distill.cache.record import Decoded
from distill.cache.shard import Shard
from distill.cache.store import open_store
from distill.cache.targets import SoftTargets
from distill.cache.view import open_shard
from distill.config.errors import CacheError

Array = NDArray[Any]

_OPEN_SHARDS, _OPEN_FAR = 64, 512
"""Whose indexes are kept at one time; more where reading one anew takes long."""


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


class _View:
    """Shards, and which of them holds what. It only grows, so that one thread may read while another adds."""

    def __init__(self, samples: int, shard: Callable[[ShardRow], Shard], open_shards: int):
        self.rows: list[ShardRow] = []
        self.index = Index(samples)
        self.open = lru_cache(open_shards)(lambda number: shard(self.rows[number]))
        self._lock = threading.Lock()

    def add(self, rows: list[ShardRow], indexes: list[tuple[Array, Array]]) -> None:
        """Shards with the ids and steps of their samples."""
        with self._lock:
            first = len(self.rows)
            self.rows += rows
            rank_of = np.empty(len(self.rows), np.int64)
            rank_of[sorted(range(len(self.rows)), key=self._key)] = np.arange(len(self.rows))
            for number, (sample_ids, steps) in enumerate(indexes, start=first):
                self.index.add(number, sample_ids, steps, rank_of)

    def find(self, sample_ids: Array) -> tuple[Array, Array, Array]:
        with self._lock:
            return self.index.find(sample_ids)

    def _key(self, number: int) -> tuple[str, int]:
        return self.rows[number].writer, self.rows[number].seq


class CacheReader:
    """A view of a cache: what was published at the last `refresh`. Any number of readers may follow any writers.

    Args:
        folder: a path, or a URL of a file system that fsspec knows.
        view: rows of each ledger to take in, as another reader's `view` says; None: all that are there. What comes
            later is taken in by `refresh`.
    """

    def __init__(self, folder: str | Path, view: Mapping[str, int] | None = None):
        """Raises CacheError: no cache, an unknown format or codec, a damaged header, rank table, ledger or index."""
        self.folder = folder
        self._store = open_store(folder)
        self.header = CacheHeader.read(self._store)
        self._identity = self.header.identity
        self.codec = make_codec(self.header.codec, self.header.vocab_size)
        self._ids_by_rank = load_ranks(self._store, self.header).astype(np.int32)
        self._ledgers: dict[str, LedgerReader] = {}
        self._unseen: list[ShardRow | Retired] = []
        self._seen: dict[str, int] = {}
        self._retired: list[Retired] = []
        self._now = self._new_view()
        if view is None:
            self.refresh()
        else:
            self._open_view(view)

    def __reduce__(self) -> tuple[type[CacheReader], tuple[str | Path, dict[str, int]]]:
        """For worker processes: there it is opened anew, with the same view."""
        return CacheReader, (self.folder, self.view)

    def refresh(self) -> int:
        """Takes in what has been published since; returns the number of new shards.

        Raises:
            CacheError: a damaged ledger or shard. The view stays what it was, and the next call fails again.
        """
        for name in ledgers(self._store):
            self._unseen += self._ledger(name).poll()
        return self._take_in()

    @property
    def view(self) -> dict[str, int]:
        """Rows of each ledger that this reader has taken in; `CacheReader(folder, view)` sees the same."""
        return dict(self._seen)

    @property
    def rows(self) -> list[ShardRow]:
        """The shards of the view, in no particular order; those that a compaction has replaced are not among them."""
        return list(self._now.rows)

    @property
    def torn(self) -> list[str]:
        """Writers whose ledger ends in a row that is not complete."""
        return [name for name, ledger in self._ledgers.items() if ledger.torn]

    @property
    def finished(self) -> bool:
        """There is a teacher's writer, and every one seen so far has said that its stream is complete."""
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
        return self._now.find(self._checked(sample_ids))[2]

    def losses(self, sample_ids: Array) -> NDArray[np.float64]:
        """For each sample id, the teacher's mean label loss on the sample's shard when captured, nats; nan: none."""
        numbers, origins = self.origins(sample_ids)
        losses = np.array([np.nan if o.loss is None else o.loss for o in origins] + [np.nan])
        found: NDArray[np.float64] = losses[numbers]  # -1, no record, is the last
        return found

    def origins(self, sample_ids: Array) -> tuple[NDArray[np.int64], list[Origin]]:
        """For each sample id, which of the returned origins its newest record has; -1: there is no record."""
        view = self._now
        shards, places, _ = view.find(self._checked(sample_ids))
        numbers, found = np.full(len(shards), -1, np.int64), list[Origin]()
        order = np.argsort(shards, kind="stable")
        order = order[np.searchsorted(shards[order], 0) :]
        for here in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1) if len(order) else ():
            shard = view.open(int(shards[here[0]]))
            numbers[here] = len(found) + shard.columns.origins[places[here]]
            found += shard.row.origins
        return numbers, found

    def read(self, sample_ids_B: Array, digests_B: Array) -> ReadResult:
        """Targets of a batch.

        digests_B: uint64 digests of the batch's own tokens, compared with those of the tokens that the teacher saw.

        Raises:
            CacheError: a digest that differs, or damaged bytes; names cache or file, and sample.
        """
        digests_B = np.asarray(digests_B, np.uint64)
        view = self._now
        shards_B, places_B, step_B = view.find(self._checked(sample_ids_B))
        covered_B = shards_B >= 0
        loss_B = torch.full((len(covered_B),), torch.nan)
        numbers = np.unique(shards_B[covered_B]).tolist()
        opened = dict(zip(numbers, self._store.map(view.open, numbers)))
        found = []
        for place in np.flatnonzero(covered_B).tolist():
            shard, index = opened[int(shards_B[place])], int(places_B[place])
            seen = int(shard.columns.digests[index])
            if seen != digests_B[place]:
                raise CacheError(
                    f"cache {self.folder}: sample {int(sample_ids_B[place])} has digest {seen:016x} in the cache, "
                    f"{int(digests_B[place]):016x} in this batch: the tokens are not those the teacher saw"
                )
            found.append((shard, index))
            if (loss := shard.origin(index).loss) is not None:
                loss_B[place] = loss
        decoded = self._decode(found)
        targets = SoftTargets(
            *self.codec.decode(decoded.atoms), decoded.valid_T, decoded.label_logprob_T, decoded.entropy_T
        )
        if len(found) < len(covered_B):
            targets = _scatter(targets, torch.from_numpy(np.repeat(covered_B, self.header.sample_tokens)))
        return ReadResult(targets, loss_B, torch.from_numpy(step_B))

    def digests(self, sample_ids: Array) -> NDArray[np.uint64]:
        """For each sample id, the digest of the tokens that the teacher saw; 0 where there is no record."""
        found = np.zeros(len(sample_ids), np.uint64)
        view = self._now
        shards, places, _ = view.find(self._checked(sample_ids))
        for number in np.unique(shards[shards >= 0]).tolist():
            here = np.flatnonzero(shards == number)
            found[here] = view.open(number).columns.digests[places[here]]
        return found

    def samples(self) -> Iterator[Sample]:
        """The newest record of every sample that has one, verified, in the order of shards: each file is read once."""
        view = self._now
        for number, row in enumerate(list(view.rows)):
            shard = self._shard(row)
            columns = shard.columns
            found, places, _ = view.find(columns.sample_ids)
            newest = np.flatnonzero((found == number) & (places == np.arange(len(places))))
            records = shard.records() if len(newest) else []
            for i in newest.tolist():
                yield Sample(
                    int(columns.sample_ids[i]),
                    int(columns.digests[i]),
                    int(columns.steps[i]),
                    shard.origin(i),
                    records[i],
                    int(columns.atoms[i]),
                    row.shard,
                )

    def records(self, sample_ids: Array) -> list[Sample | None]:
        """The newest record of each sample, verified; None where there is none."""
        view = self._now
        shards, places, steps = view.find(self._checked(sample_ids))
        numbers = np.unique(shards[shards >= 0]).tolist()
        opened = dict(zip(numbers, self._store.map(view.open, numbers)))
        there: list[Any] = [(opened[n], i) for n, i in zip(shards.tolist(), places.tolist()) if n >= 0]
        records = iter(zip(there, self._raw(there)))
        found: list[Sample | None] = []
        for step in steps.tolist():
            if step < 0:
                found.append(None)
                continue
            (shard, i), data = next(records)
            columns = shard.columns
            facts = int(columns.sample_ids[i]), int(columns.digests[i]), step, shard.origin(i), data
            found.append(Sample(*facts, int(columns.atoms[i]), shard.row.shard))
        return found

    def decode(self, samples: Sequence[Sample]) -> Decoded:
        """What the records of any samples say; CacheError if one is not what a writer writes."""
        raws = [record.Raw(sample.data, sample.atoms) for sample in samples]
        try:
            return record.decode(raws, self.header.sample_tokens, self._ids_by_rank, self.codec)
        except ValueError as error:
            bad = samples[error.args[0]]
            raise CacheError(
                f"{self._store.path('shards/' + bad.shard)} is damaged: sample {bad.sample_id} is not a record"
            ) from error

    def stats(self) -> dict[str, Any]:
        """Plain numbers, and arrays by origin in the order of steps.

        Each sample counts once; bytes and atoms are those of all published shards per token in them, so that a token
        written twice does not look cheap.
        """
        rows = self.rows
        origins = sorted((o for row in rows for o in row.origins), key=lambda origin: origin.last_step)
        tokens, covered = sum(row.tokens for row in rows), self._now.index.covered()
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
            self._ledgers[name] = LedgerReader(self._store, name, self._identity)
        return self._ledgers[name]

    def _open_view(self, view: Mapping[str, int]) -> None:
        for name, rows in view.items():
            ledger = self._ledger(name)
            if rows:
                self._unseen += ledger.poll(rows)
            if ledger.seq < rows:
                raise CacheError(
                    f"cache {self.folder}: ledger {name} has {ledger.seq} rows, {rows} when its view was taken"
                )
        self._take_in()

    def _take_in(self) -> int:
        """`_unseen` into the view, at one stroke: an error leaves everything as it was."""
        retired = self._retired + [each for each in self._unseen if isinstance(each, Retired)]
        new = outside([row for row in self._unseen if isinstance(row, ShardRow)], retired)
        view, left = self._now, outside(self._now.rows, retired)
        if len(left) < len(view.rows):  # a compaction has replaced shards of the view: begin anew without them
            new = left + new
            view = self._new_view()
        indexes = self._store.map(self._columns_of, new)
        view.add(new, indexes)
        self._now, self._retired, self._unseen = view, retired, []
        self._seen = {name: ledger.seq for name, ledger in self._ledgers.items()}
        return len(new)

    def _new_view(self) -> _View:
        return _View(self.header.samples, self._shard, _OPEN_SHARDS if self._store.appends else _OPEN_FAR)

    def _teachers(self) -> list[LedgerReader]:
        """Ledgers of teachers in training; one without a row does not say yet whose it is."""
        return [ledger for ledger in self._ledgers.values() if ledger.captures and ledger.seq]

    # ------------------------------------------------------------ shards

    def _checked(self, sample_ids: Array) -> Array:
        sample_ids = np.asarray(sample_ids)
        if len(sample_ids) and not 0 <= sample_ids.min() <= sample_ids.max() < self.header.samples:
            raise CacheError(f"cache {self.folder}: sample ids must lie in 0 to {self.header.samples - 1}")
        return sample_ids

    def _shard(self, row: ShardRow) -> Shard:
        return open_shard(self._store, self.header, row)

    def _columns_of(self, row: ShardRow) -> tuple[Array, Array]:
        columns = self._shard(row).columns
        return columns.sample_ids, columns.steps

    def _decode(self, found: list[tuple[Shard, int]]) -> Decoded:
        raws = [record.Raw(data, int(s.columns.atoms[i])) for data, (s, i) in zip(self._raw(found), found)]
        try:
            return record.decode(raws, self.header.sample_tokens, self._ids_by_rank, self.codec)
        except ValueError as error:
            shard, index = found[error.args[0]]
            sample = int(shard.columns.sample_ids[index])
            raise CacheError(f"{shard.path} is damaged: sample {sample} is not a record") from error

    def _raw(self, found: list[tuple[Shard, int]]) -> list[bytes]:
        """The records' bytes; from far away those of a shard together, and of several shards at one time."""
        if self._store.appends:
            return [shard.record(index) for shard, index in found]
        places: dict[Shard, list[int]] = {}
        for place, (shard, _) in enumerate(found):
            places.setdefault(shard, []).append(place)
        parts = self._store.map(lambda shard: shard.some_records([found[p][1] for p in places[shard]]), places)
        data = dict(zip((p for part in places.values() for p in part), (d for part in parts for d in part)))
        return [data[place] for place in range(len(found))]


def _scatter(targets: SoftTargets, covered_T: Tensor) -> SoftTargets:
    """Puts the rows of covered samples in their places among zeros."""

    def spread(rows: Tensor) -> Tensor:
        return rows.new_zeros(len(covered_T), *rows.shape[1:]).index_put_((covered_T,), rows)

    return SoftTargets(*map(spread, targets))
