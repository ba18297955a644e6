"""Tables of samples, sorted by id: where the record of each lies, and who made it. No torch.

An entry is one sample's record; an origin row is one teacher's part of a shard. Entries name their origin row, origin
rows name writers and teachers by number in two lists.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.cache.format import TOOLS
from distill.cache.origins import SOURCES, Origin
from distill.cache.shard import Shard
from distill.cache.shard_header import Replaced

Array = NDArray[Any]

ENTRY = np.dtype(
    [
        ("sample", "<i8"), ("digest", "<u8"), ("check", "<u8"), ("start", "<u4"), ("size", "<u4"), ("step", "<u4"),
        ("atoms", "<u4"), ("origin", "<u4"),
    ]
)  # fmt: skip
"""A record: sample id, digest of its tokens, check of the record, start in the shard's records, bytes, the teacher's
step, atoms, and the number of the origin row."""

ORIGIN = np.dtype(
    [
        ("writer", "<u4"), ("seq", "<u4"), ("records_at", "<u4"), ("number", "<u2"), ("source", "u1"),
        ("seen_before", "u1"), ("teacher", "<u4"), ("samples", "<u4"), ("first_step", "<u4"), ("last_step", "<u4"),
        ("tokens", "<u8"), ("tokens_seen", "<u8"), ("loss", "<f8"), ("flops_per_token", "<f8"), ("bytes", "<u8"),
        ("atoms", "<u8"), ("shard_samples", "<u4"),
    ]
)  # fmt: skip
"""A teacher's part of a shard: writer, sequence number, where the records begin in the file, number of the origin in
the shard, fields of `Origin` (loss NaN: none); bytes, atoms and samples of the whole shard in its first row, else 0."""


_NUMBERS = ("first_step", "last_step", "samples", "tokens", "tokens_seen", "flops_per_token")
"""Fields of `Origin` that a row has as they are."""


class Names(NamedTuple):
    """What origin rows name by number."""

    writers: list[str]
    teachers: list[str]

    def shard(self, row: Any) -> tuple[str, int]:
        """Writer and number of the shard of a row of ORIGIN."""
        return self.writers[row["writer"]], int(row["seq"])

    def origin(self, row: Any) -> Origin:
        """The origin of a row of ORIGIN."""
        loss = float(row["loss"])
        return Origin(
            teacher=self.teachers[row["teacher"]],
            source=SOURCES[row["source"]],
            loss=None if np.isnan(loss) else loss,
            seen_before=bool(row["seen_before"]),
            **{name: row[name].item() for name in _NUMBERS},
        )

    def into(self, other: Names, rows: Array) -> Array:
        """Origin rows whose numbers are those of `other`, which gets the names that it lacks."""
        rows = rows.copy()
        for field, mine, theirs in (
            ("writer", self.writers, other.writers),
            ("teacher", self.teachers, other.teachers),
        ):
            places = {name: number for number, name in enumerate(theirs)}
            numbers = []
            for name in mine:
                if name not in places:
                    places[name] = len(theirs)
                    theirs.append(name)
                numbers.append(places[name])
            rows[field] = np.array(numbers or [0], np.uint32)[rows[field]]
        return rows


class Found(NamedTuple):
    """Entries of some samples."""

    entries: Array
    """ENTRY [n]; anything where there is none."""
    there: NDArray[np.bool_]
    """[n]"""


@dataclass
class EntryTable:
    """A table of samples in memory."""

    entries: Array
    origins: Array
    names: Names

    @cached_property
    def _ids(self) -> Array:
        """Side by side, which searching needs."""
        return np.ascontiguousarray(self.entries["sample"])

    @classmethod
    def of_shards(cls, shards: Iterable[Shard]) -> EntryTable:
        """The newest record of each sample in some shards."""
        names = Names([], [])
        return cls._of(((entries_of(shard), origin_rows(shard, names)) for shard in shards), names)

    @classmethod
    def joined(cls, tables: Sequence[EntryTable]) -> EntryTable:
        """The newest record of each sample in several tables."""
        names = Names([], [])
        return cls._of(((each.entries.copy(), each.names.into(names, each.origins)) for each in tables), names)

    @classmethod
    def _of(cls, parts: Iterable[tuple[Array, Array]], names: Names) -> EntryTable:
        """Of entries, each with its own origin rows."""
        entries, origins, count = [np.empty(0, ENTRY)], [np.empty(0, ORIGIN)], 0
        for more, rows in parts:
            more["origin"] += count
            entries.append(more)
            origins.append(rows)
            count += len(rows)
        rows = np.concatenate(origins)
        return cls(newest(np.concatenate(entries), ranks(rows, names)), rows, names)

    def find(self, sample_ids: Array) -> Found:
        return find_in(self.entries, self._ids, sample_ids)

    def origin_rows(self, numbers: Array) -> Array:
        return self.origins[numbers]

    def chunks(self, size: int) -> Iterator[Array]:
        """Entries in order, `size` at a time."""
        return (self.entries[start : start + size] for start in range(0, len(self.entries), size))

    def origin_chunks(self) -> Iterator[Array]:
        """All origin rows."""
        return iter([self.origins])


def find_in(entries: Array, ids: Array, sample_ids: Array) -> Found:
    """Entries of samples in a sorted table, whose ids are `ids`."""
    if not len(entries):
        return Found(np.zeros(len(sample_ids), ENTRY), np.zeros(len(sample_ids), np.bool_))
    places = np.minimum(np.searchsorted(ids, sample_ids), len(ids) - 1)
    return Found(entries[places], ids[places] == sample_ids)


def entries_of(shard: Shard) -> Array:
    """An entry for each record of a shard, whose origins are rows 0 and following."""
    columns = shard.columns
    entries = np.empty(len(columns.sample_ids), ENTRY)
    entries["sample"], entries["digest"], entries["check"] = columns.sample_ids, columns.digests, shard.checks
    entries["start"], entries["size"] = shard.bounds[:-1], np.diff(shard.bounds)
    entries["step"], entries["atoms"], entries["origin"] = columns.steps, columns.atoms, columns.origins
    return entries


def origin_rows(shard: Shard, names: Names) -> Array:
    """Origin rows of a shard; `names` gets the names that it lacks."""
    header = shard.header
    rows = np.zeros(len(header.origins), ORIGIN)
    for number, origin in enumerate(header.origins):
        rows[number] = (
            _number(names.writers, header.writer), header.seq, shard.records_at, number,
            SOURCES.index(origin.source), origin.seen_before, _number(names.teachers, origin.teacher), origin.samples,
            origin.first_step, origin.last_step, origin.tokens, origin.tokens_seen,
            np.nan if origin.loss is None else origin.loss, origin.flops_per_token, 0, 0, 0,
        )  # fmt: skip
    rows[:1]["bytes"], rows[:1]["atoms"], rows[:1]["shard_samples"] = shard.size, header.atoms, header.samples
    return rows


def _number(names: list[str], name: str) -> int:
    if name not in names:
        names.append(name)
    return names.index(name)


def precedence(writer: str, seq: int) -> tuple[bool, str, int]:
    """Of equal records that of the greatest shard counts; of tools last, which are copies of some that counted."""
    return writer in TOOLS, writer, seq


def ranks(origins: Array, names: Names) -> Array:
    """For each origin row its place in the order of `precedence`."""
    by_name = sorted(range(len(names.writers)), key=lambda number: precedence(names.writers[number], 0))
    writers = np.argsort(by_name) if by_name else np.zeros(1, np.int64)
    order = np.lexsort((origins["seq"], writers[origins["writer"]]))
    sorted_rows = origins[["writer", "seq"]][order]
    places = np.zeros(len(origins), np.int64)
    places[order[1:]] = np.cumsum(sorted_rows[1:] != sorted_rows[:-1])  # rows of one shard are alike
    return places


def newest(entries: Array, ranks_O: Array) -> Array:
    """Of entries in any order the one that counts of each sample, sorted by id.

    The greatest step counts, then the greatest check, which is the same wherever a compaction has copied the record
    to; of equal records that of the shard with the greatest rank, and then the later one within a shard.
    """
    order = np.argsort(entries["sample"], kind="stable")
    entries = entries[order]
    ids = entries["sample"]
    if len(ids) < 2 or not (twice := ids[1:] == ids[:-1]).any():
        return entries
    some = np.zeros(len(ids), np.bool_)
    some[1:] |= twice
    some[:-1] |= twice
    places = np.flatnonzero(some)
    part = entries[places]
    part = part[np.lexsort((part["start"], ranks_O[part["origin"]], part["check"], part["step"], part["sample"]))]
    entries[places] = part
    last = np.ones(len(ids), np.bool_)
    last[:-1] = ids[1:] != ids[:-1]
    return entries[last]


def replaced_rows(origins: Array, names: Names, replaced: Sequence[Replaced]) -> NDArray[np.bool_]:
    """Which origin rows are of shards in these ranges."""
    out = np.zeros(len(origins), np.bool_)
    numbers = {name: number for number, name in enumerate(names.writers)}
    for each in replaced:
        if each.writer in numbers:
            seqs = origins["seq"]
            out |= (origins["writer"] == numbers[each.writer]) & (seqs >= each.first) & (seqs <= each.last)
    return out
