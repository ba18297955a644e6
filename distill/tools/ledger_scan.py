"""A ledger read line by line without trust, and its damaged rows made again from the shards' files. No torch."""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

from distill.cache.format import LEDGER, SHARDS, TEMPORARY, row_object, row_of
from distill.cache.header import CacheHeader
from distill.cache.ledger import LedgerReader, Retired, ShardRow
from distill.cache.seal import seal
from distill.cache.store import Store
from distill.cache.view import Published, settle
from distill.config.errors import CacheError
from distill.tools.common import TOOLS
from distill.tools.shard_scan import row_from_file

_LINE = re.compile(rb"[^\n]*\n|[^\n]+")
_ROW = re.compile(rb'\{"kind": .*?"digest": "[0-9a-f]{16}"\}', re.DOTALL)

SHORTEST_SHARD_ROW = 250
"""Bytes; the other kinds of rows that a writer makes are shorter."""


class Line(NamedTuple):
    """A line of a ledger's file, or one of its objects."""

    name: str
    """Of the file or object."""
    data: bytes
    seq: int
    """Of the row, or where a row of this ledger is expected."""
    rows: list[ShardRow | Retired]
    problem: str
    """What is wrong with it; "": nothing."""


class LedgerScan(NamedTuple):
    """One ledger, whatever its state."""

    writer: str
    lines: list[Line]
    torn: int
    """Bytes of a row at the end that was not finished."""
    torn_in: str
    """The file that ends in it, or the object that is it."""

    @property
    def good(self) -> dict[int, Line]:
        """Rows that verify, by number."""
        return {line.seq: line for line in self.lines if not line.problem}

    @property
    def missing(self) -> list[int]:
        """Numbers of rows that are damaged or gone; those after the last row are as many as damaged lines follow it."""
        good = self.good
        after = sum(1 for _ in takewhile(lambda line: line.problem, reversed(self.lines)))
        return [seq for seq in range(max(good, default=-1) + 1 + after) if seq not in good]

    @property
    def problems(self) -> list[str]:
        """One sentence each."""
        problems = [line.problem for line in self.lines if line.problem]
        bad, missing = len(problems), len(self.missing)
        if missing > bad:
            problems.append(f"ledger {self.writer}: {missing} rows are damaged or missing, {bad} lines damaged")
        return problems


def scan_ledger(store: Store, writer: str, header: CacheHeader) -> LedgerScan:
    """Reads a whole ledger. Whatever it holds, this succeeds; CacheError only where a file cannot be read."""
    lines: list[Line] = []
    torn, torn_in = 0, ""
    reader = LedgerReader(store, writer, header.identity)
    file = f"{LEDGER}/{writer}.jsonl"
    objects = [f"{LEDGER}/{writer}/{each}" for each in store.names(f"{LEDGER}/{writer}") if each.endswith(".json")]
    pieces = [(file, data) for data in _LINE.findall(store.read(file))] if store.exists(file) else []
    pieces += zip(objects, store.read_many(objects), strict=True)
    for number, (name, data) in enumerate(pieces, start=1):
        # Only at the end of the file, and in the last object, can a row be one that was not finished.
        if name in (file, *objects[-1:]) and not data.endswith(b"\n") and not LedgerReader.is_whole(data):
            torn, torn_in = len(data), name
        else:
            where = f"{store.path(name)} line {number}" if name == file else store.path(name)
            lines.append(_parsed(reader, name, data, where, lines[-1].seq + 1 if lines else 0))
    return LedgerScan(writer, lines, torn, torn_in)


def _parsed(reader: LedgerReader, name: str, data: bytes, where: str, expected: int) -> Line:
    """The row, by the number that is expected there or by the one that it claims, if that is not below."""
    problem = ""
    for seq in (expected, _claimed(data)):
        if seq is not None and seq >= expected:
            reader.seq = seq
            try:
                return Line(name, data, seq, reader.parse(data, where), "")
            except CacheError as error:
                problem = str(error)
    return Line(name, data, expected, [], problem)


def _claimed(data: bytes) -> int | None:
    """The number in a row, verified or not."""
    try:
        seq = json.loads(data)["seq"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return seq if isinstance(seq, int) and seq >= 0 else None


def rows_of(scans: Sequence[LedgerScan]) -> Published:
    """Rows that count and rows that are retired, of all that verify."""
    return settle(each for ledger in scans for line in ledger.lines if not line.problem for each in line.rows)


# ---------------------------------------------------------------- mending


def mended(store: Store, header: CacheHeader, scan: LedgerScan) -> tuple[list[Line], list[str]]:
    """Makes the lost rows of a ledger again, from the shards' files, which hold all that a row holds.

    Where there is no such file, an empty row holds the number, because views that checkpoints pin count rows; at the
    end of a ledger it is left out. Returns the ledger's lines, with every number there once, and a sentence about each
    line that is new.
    """
    good = scan.good
    files = lost_shards(store, scan)
    damaged = [line for line in scan.lines if line.problem]
    run_together = _run_together(store, header, scan.writer, damaged)
    numbers = {*scan.missing, *run_together, *files} - set(good)
    made = {seq: row for seq in numbers if (row := _from_files(store, header, scan, files.get(seq, []))) is not None}
    last = max([*good, *made, *run_together], default=-1)
    # A ledger may begin as a file and go on as objects.
    in_file = [line.seq for line in scan.lines if line.name.endswith(".jsonl")]
    as_objects = any(line.name.endswith(".json") for line in scan.lines) or not (scan.lines or store.grows)
    was_short = bool(damaged) and len(damaged[-1].data) < SHORTEST_SHARD_ROW
    messages = []
    for seq in sorted((set(range(last + 1)) | set(scan.missing)) - set(good)):
        where = f"ledger {scan.writer}: row {seq}"
        as_object = as_objects and seq > max(in_file, default=-1)
        name = row_object(scan.writer, seq) if as_object else f"{LEDGER}/{scan.writer}.jsonl"
        if seq in run_together:
            good[seq] = run_together[seq]
            messages.append(f"{where} is whole, but for the newline beside it")
        elif seq in made:
            data = seal({"kind": "shard"} | dataclasses.asdict(made[seq]))
            good[seq] = Line(name, data, seq, [made[seq]], "")
            messages.append(f"{where} is made again from {made[seq].shard}")
        elif seq < last or was_short:
            # A row that changes nothing: a tool's retires nothing; a writer's is `finish`, until its next row.
            empty = {"kind": "finish", "writer": scan.writer, "seq": seq, "cache": header.identity}
            if scan.writer in TOOLS:
                empty |= {"kind": "retire", "retired": []}
            good[seq] = Line(name, seal(empty), seq, [], "")
            messages.append(f"{where} cannot be made again; an empty row takes its place")
        else:
            messages.append(f"{where} cannot be made again; the ledger ends before it")
            break
    return [good[seq] for seq in sorted(good)], messages


def lost_shards(store: Store, scan: LedgerScan) -> dict[int, list[str]]:
    """Shards by the number of a row that the ledger lacks. After its end, only a writer's: a tool begins anew."""
    last, files = max(scan.good, default=-1), dict[int, list[str]]()
    for name in store.names(SHARDS):
        row = row_of(name)
        if row is None or row.writer != scan.writer or row.seq in scan.good or name.endswith(TEMPORARY):
            continue
        if row.seq <= last or row.seq in scan.missing or row.writer not in TOOLS:
            files.setdefault(row.seq, []).append(name)
    return files


def _run_together(store: Store, header: CacheHeader, writer: str, damaged: list[Line]) -> dict[int, Line]:
    """Rows that verify within damaged lines: the newline after them, or before them, is not one any more."""
    rows = [(line.name, data + b"\n") for line in damaged for data in _ROW.findall(line.data)]
    reader = LedgerReader(store, writer, header.identity)
    lines = [_parsed(reader, name, data, name, 0) for name, data in rows]
    return {line.seq: line for line in lines if not line.problem}


def _from_files(store: Store, header: CacheHeader, scan: LedgerScan, names: list[str]) -> ShardRow | None:
    """From the first of these shards that is whole."""
    others = Counter(row.source for line in scan.good.values() for row in line.rows if isinstance(row, ShardRow))
    source = scan.writer if scan.writer in TOOLS else others.most_common(1)[0][0] if others else None
    for name in names:
        try:
            return row_from_file(store, name, header.identity, source)
        except CacheError:
            continue
    return None
