"""Everything in a cache, looked at without trust: ledgers line by line, shards record by record. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import xxhash

from distill.cache.format import LEDGER, SHARDS
from distill.cache.header import CacheHeader
from distill.cache.ledger import LedgerReader, Origin, Retired, ShardRow
from distill.cache.seal import digest
from distill.cache.shard import Array, Shard, parse
from distill.cache.store import Store
from distill.cache.view import Published, settle
from distill.config.errors import CacheError

_BLOCK = 8 << 20
"""Bytes of one read."""


class Line(NamedTuple):
    """A line of a ledger's file, or one of its objects."""

    name: str
    """Of the file or object."""
    data: bytes
    seq: int
    """Of the row, or where a row of this ledger is expected."""
    rows: list[ShardRow | Retired]
    error: str
    """What is wrong with it; "": nothing."""


class Scan(NamedTuple):
    """One ledger."""

    writer: str
    lines: list[Line]
    torn: int
    """Bytes of a row at the end that was not finished."""
    torn_in: str
    """The file that ends in it, or the object that is it."""

    @property
    def good(self) -> dict[int, Line]:
        """Rows that verify, by number."""
        return {line.seq: line for line in self.lines if not line.error}

    @property
    def missing(self) -> list[int]:
        """Numbers of rows that are damaged or gone; those after the last row are as many as damaged lines follow it."""
        good = self.good
        last = max(good, default=-1)
        after = 0
        for line in reversed(self.lines):
            if not line.error:
                break
            after += 1
        return [seq for seq in range(last + 1 + after) if seq not in good]

    @property
    def problems(self) -> list[str]:
        """One line each."""
        found = [line.error for line in self.lines if line.error]
        bad = len(found)
        if len(self.missing) > bad:
            found.append(f"ledger {self.writer}: {len(self.missing)} rows are damaged or missing, {bad} lines damaged")
        return found


def scan(store: Store, writer: str, header: CacheHeader) -> Scan:
    """Reads a whole ledger. Whatever it holds, this succeeds; CacheError only where a file cannot be read."""
    reader = LedgerReader(store, writer, header.identity)
    lines: list[Line] = []
    torn, torn_in = 0, ""
    name = f"{LEDGER}/{writer}.jsonl"

    def take(name: str, data: bytes, where: str) -> None:
        expected = lines[-1].seq + 1 if lines else 0
        claimed = _claimed(data)
        for seq in (expected, claimed):
            if seq is None or seq < expected:
                continue
            reader.seq = seq
            try:
                rows = reader.parse(data, where)
            except CacheError as error:
                problem = str(error)
            else:
                lines.append(Line(name, data, seq, rows, ""))
                return
        lines.append(Line(name, data, expected, [], problem))

    if store.exists(name):
        *whole, rest = store.read(name).split(b"\n")
        for number, line in enumerate(whole):
            take(name, line + b"\n", f"{store.path(name)} line {number + 1}")
        if LedgerReader.is_whole(rest):
            take(name, rest, f"{store.path(name)} line {len(whole) + 1}")
        else:
            torn, torn_in = len(rest), name
    objects = [f"{LEDGER}/{writer}/{each}" for each in store.names(f"{LEDGER}/{writer}") if each.endswith(".json")]
    for name, data in zip(objects, store.read_many(objects), strict=True):
        if name == objects[-1] and not data.endswith(b"\n") and not LedgerReader.is_whole(data):
            torn, torn_in = len(data), name
        else:
            take(name, data, store.path(name))
    return Scan(writer, lines, torn, torn_in)


def read_row(store: Store, header: CacheHeader, writer: str, name: str, data: bytes) -> Line:
    """One row by itself, whatever its number."""
    reader = LedgerReader(store, writer, header.identity)
    reader.seq = seq = _claimed(data) or 0
    try:
        return Line(name, data, seq, reader.parse(data, name), "")
    except CacheError as error:
        return Line(name, data, seq, [], str(error))


def _claimed(data: bytes) -> int | None:
    """The number that a row says it has."""
    try:
        seq = json.loads(data)["seq"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return seq if isinstance(seq, int) and seq >= 0 else None


def rows_of(scans: Sequence[Scan]) -> Published:
    """Rows that count and rows that are retired, of all that verify."""
    return settle(each for ledger in scans for line in ledger.lines if not line.error for each in line.rows)


class Finding(NamedTuple):
    """One shard."""

    shard: Shard | None
    """None: nothing of it can be read."""
    records: list[bytes | None]
    """If they were asked for: None where one is damaged."""
    problems: list[str]


def examine(
    store: Store,
    header: CacheHeader,
    row: ShardRow,
    *,
    keep: bool = False,
    bad: Callable[[list[bytes], list[int]], list[int]] | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> Finding:
    """Verifies every byte of a shard.

    keep: return the records; with `bad`, even those of a shard whose index is damaged, where that can be. bad: places
    of those, among some records with so many atoms each, that cannot be decoded.
    """
    name = f"{SHARDS}/{row.shard}"
    whole = xxhash.xxh3_64()
    problems: list[str] = []
    try:
        size = store.size(name)
        if size != row.bytes:
            problems.append(f"{store.path(name)} is damaged: {size} bytes, {row.bytes} in the ledger")
        shard = Shard(store, row, whole=False)
        ids = shard.columns.sample_ids
        if len(ids) and int(ids.max()) >= header.samples:
            raise CacheError(f"{shard.name}: does not fit a corpus of {header.samples} samples")
    except CacheError as error:
        problems.append(str(error))
        salvaged = _without_index(store, header, row) if keep and bad is not None else None
        if salvaged is None:
            progress(row.bytes)
            return Finding(None, [], problems)
        shard, ids = salvaged, salvaged.columns.sample_ids
    problems += _facts(shard)
    whole.update(store.read_at(name, 0, row.index_bytes))
    progress(row.index_bytes)
    found: list[bytes | None] = []
    for first, end in blocks(shard.bounds):
        data = shard.read(first, end)
        whole.update(data)
        pieces: list[bytes | None] = []
        bounds = (shard.bounds[first : end + 1] - shard.bounds[first]).tolist()
        for i in range(first, end):
            piece = data[bounds[i - first] : bounds[i - first + 1]]
            try:
                if not 0 <= int(ids[i]) < header.samples:
                    raise CacheError(f"{shard.path} is damaged: sample {int(ids[i])} does not verify")
                pieces.append(shard.verified(i, piece))
            except CacheError as error:
                problems.append(str(error))
                pieces.append(None)
        if bad is not None:
            sound = [i for i, piece in enumerate(pieces) if piece is not None]
            atoms = shard.columns.atoms[first:end]
            for place in bad([piece for piece in pieces if piece is not None], [int(atoms[i]) for i in sound]):
                sample = int(ids[first + sound[place]])
                problems.append(f"{shard.path} is damaged: sample {sample} verifies and is not a record")
                pieces[sound[place]] = None
        if keep:
            found += pieces
        progress(len(data))
    if whole.hexdigest() != row.file_digest and not problems:
        problems.append(f"{shard.path} is damaged: its digest is {whole.hexdigest()}, {row.file_digest} in the ledger")
    return Finding(shard, found, problems)


def _without_index(store: Store, header: CacheHeader, row: ShardRow) -> Shard | None:
    """A shard whose index does not verify, if its records can be told from their own checks.

    These bind id and token digest. One origin is whose it is, whatever the column says; of the step it is known that
    it is at least the origin's first; and the number of atoms shows when a record is decoded.
    """
    if len(row.origins) != 1:
        return None
    try:
        shard = Shard(store, row, whole=False, sound=False)
    except CacheError:
        return None
    zeros = np.zeros(row.samples, np.int64)
    first = row.origins[0].first_step
    shard.columns = shard.columns._replace(steps=zeros + first, origins=zeros)
    return shard


def blocks(bounds: Array) -> list[tuple[int, int]]:
    """Runs of records of about 8 MB, which lie between `bounds`: first and end of each."""
    found, first, count = [], 0, len(bounds) - 1
    while first < count:
        end = int(np.searchsorted(bounds, bounds[first] + _BLOCK, side="right")) - 1
        end = min(max(end, first + 1), count)
        found.append((first, end))
        first = end
    return found


def _facts(shard: Shard) -> list[str]:
    """Where the ledger's row and the verified index disagree."""
    row, columns = shard.row, shard.columns
    said = (row.first_sample, row.last_sample, row.atoms, row.tokens)
    ids = columns.sample_ids
    true = (
        int(ids.min(initial=2**62)),
        int(ids.max(initial=-1)),
        int(columns.atoms.sum()),
        sum(o.tokens for o in row.origins),
    )
    counts = np.bincount(columns.origins, minlength=len(row.origins)).tolist()
    problems = []
    if said != true:
        problems.append(f"{shard.path}: first and last sample, atoms and tokens are {true}, {said} in the ledger")
    if counts != [origin.samples for origin in row.origins]:
        problems.append(f"{shard.path}: its origins do not have the samples that the ledger says")
    return problems


def row_from_file(store: Store, name: str, identity: str, source: str | None) -> ShardRow:
    """The ledger row of a shard, made again from the file alone; ValueError or CacheError: the file is not whole.

    source: who wrote it; None: as its records' origin says.
    """
    data = store.read(f"{SHARDS}/{name}")
    writer, seq, stated = name.removesuffix(".safetensors").rsplit("-", 2)
    if digest(data) != stated:
        raise ValueError("its digest is not that of its name")
    front = 8 + int.from_bytes(data[:8], "little")
    facts = json.loads(data[8:front])["__metadata__"]
    if facts["cache"] != identity:
        raise ValueError("it belongs to another cache")
    origins = tuple(Origin(**origin) for origin in json.loads(facts["origins"]))
    spans = parse(data, len(data))
    index_bytes = spans["records"][0]
    ids = np.frombuffer(data[slice(*spans["sample_ids"])], np.int64)
    atoms = np.frombuffer(data[slice(*spans["atoms"])], np.uint32)
    return ShardRow(
        writer=writer,
        seq=int(seq),
        cache=identity,
        shard=name,
        source=source or origins[0].source,
        samples=len(ids),
        first_sample=int(ids.min()),
        last_sample=int(ids.max()),
        tokens=sum(origin.tokens for origin in origins),
        atoms=int(atoms.sum()),
        bytes=len(data),
        file_digest=stated,
        index_bytes=index_bytes,
        index_digest=digest(memoryview(data)[:index_bytes]),
        origins=origins,
    )
