"""The append-only list of published shards, one ledger per writer. No torch.

A row is one line of sealed JSON: of `ledger/<writer>.jsonl` where files can grow, else an object of its own,
`ledger/<writer>/<seq>.json`. A ledger may begin as a file and go on as objects. A line without its newline is a row
that is being written, or was when its writer died; readers pass over it with a warning.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.cache.fields import checked
from distill.cache.format import LEDGER, row_object
from distill.cache.open_store import open_store
from distill.cache.seal import seal, unseal
from distill.cache.store import Store
from distill.config.errors import CacheError

log = logging.getLogger(__name__)

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,250}")
_WHOLE_ROW = re.compile(rb'"digest": "[0-9a-f]{16}"\}.', re.DOTALL)


@dataclass(frozen=True)
class Origin:
    """The teacher that made some records of a shard, and the steps at which it did."""

    teacher: str
    """Identity of the teacher."""
    source: str
    """capture, backfill or import."""
    first_step: int
    last_step: int
    samples: int
    tokens: int
    """Tokens that have a target."""
    tokens_seen: int
    """Tokens that the teacher had trained on before the last of these samples."""
    loss: float | None
    """Teacher's mean label loss over its shard, nats; null without tokens."""
    seen_before: bool
    """The teacher had trained on these samples."""
    flops_per_token: float
    """FLOPs of the teacher's forward pass; 0: not known."""


@dataclass(frozen=True)
class ShardRow:
    """One published shard."""

    writer: str
    seq: int
    """Number of the row in its ledger, from 0."""
    cache: str
    """Digest of the cache's header."""
    shard: str
    """File name in `shards/`."""
    source: str
    """What wrote the shard: capture, backfill, import, compact, merge or repair."""
    samples: int
    first_sample: int
    """Smallest id; the shard lists all of them."""
    last_sample: int
    tokens: int
    """Tokens that have a target."""
    atoms: int
    bytes: int
    """Size of the file."""
    file_digest: str
    index_bytes: int
    """Header and index columns, at the start of the file."""
    index_digest: str
    origins: tuple[Origin, ...]

    @property
    def last_step(self) -> int:
        return max((origin.last_step for origin in self.origins), default=-1)

    @classmethod
    def of(cls, record: dict[str, Any]) -> ShardRow:
        """From JSON; raises TypeError, KeyError or ValueError when it is not a row."""
        row = checked(cls, record | {"origins": tuple(checked(Origin, origin) for origin in record["origins"])})
        counts = (row.seq, row.samples, row.first_sample, row.tokens, row.atoms, row.bytes, row.index_bytes)
        if min(counts) < 0 or not _FILE_NAME.fullmatch(row.shard):
            raise ValueError("a number or a name that cannot be")
        return row


@dataclass(frozen=True)
class Retired:
    """A range of a ledger's rows whose records all lie in other shards now."""

    ledger: str
    first: int
    last: int
    """Inclusive."""


def outside(rows: list[ShardRow], retired: Iterable[Retired]) -> list[ShardRow]:
    """The rows that are not retired, in their order."""
    ranges: dict[str, list[tuple[int, int]]] = {}
    for each in sorted(retired, key=lambda each: (each.ledger, each.first)):
        there = ranges.setdefault(each.ledger, [])
        # Only ranges that reach further than all before them: then the last that begins at or before a row decides.
        if not there or each.last > there[-1][1]:
            there.append((each.first, each.last))
    kept = []
    for row in rows:
        there = ranges.get(row.writer, [])
        place = bisect_right(there, (row.seq, 2**63)) - 1
        if place < 0 or there[place][1] < row.seq:
            kept.append(row)
    return kept


class LedgerReader:
    """Follows one ledger.

    Args:
        cache: digest of the cache's header, which every row must name.
    """

    def __init__(self, store: Store, writer: str, cache: str):
        self.store, self.writer, self._cache = store, writer, cache
        self.offset = 0
        """Bytes of complete rows read from the file."""
        self.seq = 0
        """Rows read."""
        self.finished = False
        """The last row read says that the writer's stream is complete."""
        self.torn = 0
        """Bytes of a row at the file's end that is not complete."""
        self.torn_object = ""
        """The object that is not a complete row, of a store where an upload is visible while it lasts."""
        self._objects = 0
        """Rows read that are objects."""
        self.captures = True
        """Every row read comes from a teacher in training."""
        self.last_step = -1
        """The greatest of all rows read."""

    def poll(self, limit: int | None = None) -> list[ShardRow | Retired]:
        """New complete rows, in order; stops after row number `limit` - 1.

        Raises:
            CacheError: a row that does not verify, is out of sequence, or was cut off after it had been read. Nothing
                counts as read then: the next call returns the rows in front of it again.
        """
        before = dict(self.__dict__)
        entries: list[ShardRow | Retired] = []
        try:
            for line, where in self._lines(limit):
                entries += self.parse(line, where)
                if limit is not None and self.seq >= limit:
                    break
        except BaseException:
            self.__dict__.update(before)
            raise
        return entries

    def _lines(self, limit: int | None) -> Iterator[tuple[bytes, str]]:
        """New lines, and where each lies."""
        if not self._objects:  # the file ends where they begin
            yield from self._file_lines(f"{LEDGER}/{self.writer}.jsonl")
        if limit is not None and self.seq >= limit:
            return
        first = row_object(self.writer, self.seq)
        if self._objects and not self._is_there(first):
            return
        there = [name for name in self.store.names(f"{LEDGER}/{self.writer}") if name.endswith(".json")]
        fresh = [name for each in there if (name := f"{LEDGER}/{self.writer}/{each}") >= first]
        for seq, name in enumerate(fresh, start=self.seq):
            if name != row_object(self.writer, seq):
                raise CacheError(f"{self.store.path(row_object(self.writer, seq))}: the row is missing")
        self.torn_object = ""
        for name, data in zip(fresh, self.store.read_many(fresh), strict=True):
            if name == fresh[-1] and not data.endswith(b"\n") and not self.is_whole(data):
                log.warning("%s: %d bytes of a row that is not complete, not used", self.store.path(name), len(data))
                self.torn_object = name
                return
            yield data, self.store.path(name)
            self._objects += 1

    def _is_there(self, name: str) -> bool:
        """By reading the object, which is one request however many rows there are."""
        try:
            self.store.read_many([name])
        except CacheError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return False
            raise
        return True

    def _file_lines(self, name: str) -> Iterator[tuple[bytes, str]]:
        try:
            size = self.store.size(name)
        except CacheError as error:
            if isinstance(error.__cause__, FileNotFoundError) and not self.offset:
                return
            raise
        where = self.store.path(name)
        if size < self.offset:
            raise CacheError(f"{where} is damaged: {size} bytes, {self.offset} have been read before")
        data = self.store.read_at(name, self.offset, size - self.offset)
        *lines, torn = data.split(b"\n")
        for line in lines:
            self.offset += len(line) + 1  # before the row is used: the caller may not ask for the next one
            yield line + b"\n", f"{where} line {self.seq + 1}"
        if self.is_whole(torn):
            raise CacheError(f"{where} line {self.seq + 1} is damaged: no newline where the row ends")
        if torn and len(torn) != self.torn:
            log.warning("%s line %d: %d bytes of a row that is not complete, not used", where, self.seq + 1, len(torn))
        self.torn = len(torn)

    @staticmethod
    def is_whole(tail: bytes) -> bool:
        """Bytes without a newline hold a whole row, so the newline is damaged."""
        return _WHOLE_ROW.search(tail) is not None

    def parse(self, line: bytes, where: str) -> list[ShardRow | Retired]:
        """Shards and ranges of the next row, number `seq`; CacheError when the line is not that row."""
        try:
            record = unseal(line)
            kind = record.pop("kind")
            if (record["writer"], record["seq"]) != (self.writer, self.seq):
                raise ValueError(f"it is row {record['seq']!s:.80} of {record['writer']!s:.80}, expected {self.seq}")
            if record["cache"] != self._cache:
                raise ValueError(f"it belongs to another cache, {record['cache']!s:.80}; this one is {self._cache}")
            entries: list[ShardRow | Retired] = []
            if kind == "shard":
                entries = [row := ShardRow.of(record)]
                self.captures = self.captures and row.source == "capture"
                self.last_step = max(self.last_step, row.last_step)
            elif kind == "retire":
                self.captures = False
                entries = [checked(Retired, retired) for retired in record["retired"]]
            elif kind != "finish":
                raise ValueError(f"its kind is {kind!r:.80}")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CacheError(f"{where} is damaged: {error!s:.300}") from error
        self.finished = kind == "finish"
        self.seq += 1
        return entries


def ledgers(store: Store) -> list[str]:
    """Names of the writers that have a ledger."""
    names = {name.removesuffix(".jsonl") for name in store.names(LEDGER)}
    return sorted(name for name in names if "." not in name)


def is_written(folder: str | Path) -> bool:
    """Whether a writer has been opened on this folder, or URL."""
    return bool(ledgers(open_store(folder)))


class LedgerWriter:
    """Appends to one ledger.

    The caller holds the writer's lock. In a store without locks a row's name is taken only once.
    """

    def __init__(self, store: Store, writer: str, cache: str):
        """Reads the ledger and removes a torn last row.

        Raises:
            CacheError: a damaged complete row, or a file that cannot be opened.
        """
        self.store, self.writer, self.cache = store, writer, cache
        self._name = f"{LEDGER}/{writer}.jsonl"
        reader = LedgerReader(store, writer, cache)
        self.rows = [row for row in reader.poll() if isinstance(row, ShardRow)]
        self.seq, self.finished = reader.seq, reader.finished
        # Where the ledger has objects, the file ends where they begin.
        self._appends = store.grows and not store.names(f"{LEDGER}/{writer}")
        if self._appends:
            store.append(self._name, b"")
        if reader.torn:
            log.warning("%s: removed a torn last row of %d bytes", store.path(self._name), reader.torn)
            store.truncate(self._name, reader.offset)
        if reader.torn_object:
            log.warning("%s: removed a torn last row", store.path(reader.torn_object))
            store.remove(reader.torn_object)

    def append(self, row: ShardRow) -> None:
        """Publishes a shard: returns when the row is on disk."""
        self._append({"kind": "shard"} | dataclasses.asdict(row))
        self.finished = False

    def retire(self, retired: Iterable[Retired]) -> None:
        """Takes rows of any ledgers out of the cache, because their records lie in other shards."""
        self._append(self._record("retire") | {"retired": [dataclasses.asdict(r) for r in retired]})

    def finish(self) -> None:
        """Marks this writer's stream as complete, unless the last row does already."""
        if not self.finished:
            self._append(self._record("finish"))
            self.finished = True

    def _record(self, kind: str) -> dict[str, object]:
        return {"kind": kind, "writer": self.writer, "seq": self.seq, "cache": self.cache}

    def _append(self, record: dict[str, object]) -> None:
        """A part that an error leaves behind is a torn row, which the next opening of the writer removes."""
        if self._appends:
            self.store.append(self._name, seal(record))
        else:
            name = row_object(self.writer, self.seq)
            if not self.store.create(name, seal(record)):
                raise CacheError(f"{self.store.path(name)}: another live process has the writer's name {self.writer!r}")
        self.seq += 1
