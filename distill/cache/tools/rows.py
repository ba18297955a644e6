"""A damaged ledger, row by row: made again from the shards' files, which say all that a row says. No torch."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

from distill.cache.header import CacheHeader
from distill.cache.layout import LEDGER, SHARDS, row_object
from distill.cache.ledger import ShardRow
from distill.cache.seal import seal
from distill.cache.store import Store
from distill.cache.tools.common import TOOLS, writer_of
from distill.cache.tools.scan import Line, Scan, read_row, row_from_file
from distill.config.errors import CacheError

_ROW = re.compile(rb'\{"kind": .*?"digest": "[0-9a-f]{16}"\}', re.DOTALL)

SHORTEST_SHARD_ROW = 250
"""Bytes; the other kinds of rows that a writer makes are shorter."""


def mended(store: Store, header: CacheHeader, found: Scan) -> tuple[list[Line], list[str]]:
    """The ledger's lines with every number there once, and what to say about those that are new.

    Where no file tells what a lost row said, an empty row holds its number, because views that checkpoints pin count
    rows; at the end of a ledger it is left out.
    """
    good = found.good
    last = max(good, default=-1)
    files = {writer_of(name): name for name in store.names(SHARDS)}
    damaged = [line for line in found.lines if line.error]
    run_together = _run_together(store, header, found.writer, damaged)
    # A ledger may begin as a file and go on as objects.
    file_ends = max((line.seq for line in found.lines if line.name.endswith(".jsonl")), default=-1)
    has_objects = any(line.name.endswith(".json") for line in found.lines)
    said = []
    for seq in sorted({*found.missing, *run_together} - set(good)):
        if seq in run_together:
            good[seq] = run_together[seq]
            said.append(f"ledger {found.writer}: row {seq} is whole, but for the newline beside it")
            continue
        where = f"ledger {found.writer}: row {seq}"
        as_object = has_objects and seq > file_ends
        name = row_object(found.writer, seq) if as_object else f"{LEDGER}/{found.writer}.jsonl"
        row = _from_file(store, header, found, files.get((found.writer, seq)))
        if row is not None:
            data = seal({"kind": "shard"} | dataclasses.asdict(row))
            good[seq] = Line(name, data, seq, [row], "")
            said.append(f"{where} is made again from {row.shard}")
            continue
        was_short = bool(damaged) and len(damaged[-1].data) < SHORTEST_SHARD_ROW
        if seq < last or was_short or any(later in files_after(files, found.writer, seq) for later in found.missing):
            good[seq] = Line(name, _empty(header, found, seq), seq, [], "")
            said.append(f"{where} cannot be made again; an empty row takes its place")
        else:
            said.append(f"{where} cannot be made again; the ledger ends before it")
            break
    return [good[seq] for seq in sorted(good)], said


def _run_together(store: Store, header: CacheHeader, writer: str, damaged: list[Line]) -> dict[int, Line]:
    """Rows that verify within damaged lines: the newline after them, or before them, is not one any more."""
    rows = [(line.name, data + b"\n") for line in damaged for data in _ROW.findall(line.data)]
    return {line.seq: line for name, data in rows if not (line := read_row(store, header, writer, name, data)).error}


def files_after(files: dict[tuple[str, int] | None, str], writer: str, seq: int) -> set[int]:
    """Numbers of later rows whose shards are there."""
    return {found[1] for found in files if found is not None and found[0] == writer and found[1] > seq}


def _from_file(store: Store, header: CacheHeader, found: Scan, name: str | None) -> ShardRow | None:
    if name is None:
        return None
    others = Counter(row.source for line in found.good.values() for row in line.rows if isinstance(row, ShardRow))
    source = found.writer if found.writer in TOOLS else others.most_common(1)[0][0] if others else None
    try:
        return row_from_file(store, name, header.identity, source)
    except (ValueError, KeyError, TypeError, IndexError, CacheError):
        return None


def _empty(header: CacheHeader, found: Scan, seq: int) -> bytes:
    """A row that changes nothing: a tool's retires nothing; a writer's says `finish`, until its next row."""
    row: dict[str, object] = {"writer": found.writer, "seq": seq, "cache": header.identity}
    if found.writer in TOOLS:
        return seal({"kind": "retire"} | row | {"retired": []})
    return seal({"kind": "finish"} | row)
