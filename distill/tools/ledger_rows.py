"""A damaged ledger, row by row: made again from the shards' files, which say all that a row says. No torch."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

from distill.cache.format import LEDGER, SHARDS, TEMPORARY, row_object
from distill.cache.header import CacheHeader
from distill.cache.ledger import ShardRow
from distill.cache.seal import seal
from distill.cache.store import Store
from distill.config.errors import CacheError
from distill.tools.common import TOOLS, writer_of
from distill.tools.scan import Line, Scan, read_row, row_from_file

_ROW = re.compile(rb'\{"kind": .*?"digest": "[0-9a-f]{16}"\}', re.DOTALL)

SHORTEST_SHARD_ROW = 250
"""Bytes; the other kinds of rows that a writer makes are shorter."""


def mended(store: Store, header: CacheHeader, found: Scan) -> tuple[list[Line], list[str]]:
    """The ledger's lines with every number there once, and what to say about those that are new.

    Where no file tells what a lost row said, an empty row holds its number, because views that checkpoints pin count
    rows; at the end of a ledger it is left out.
    """
    good = found.good
    files = strays(store, found)
    damaged = [line for line in found.lines if line.error]
    run_together = _run_together(store, header, found.writer, damaged)
    numbers = {*found.missing, *run_together, *files} - set(good)
    made = {seq: row for seq in numbers if (row := _from_file(store, header, found, files.get(seq, []))) is not None}
    last = max([*good, *made, *run_together], default=-1)
    # A ledger may begin as a file and go on as objects.
    in_file = [line.seq for line in found.lines if line.name.endswith(".jsonl")]
    as_objects = any(line.name.endswith(".json") for line in found.lines) or not (found.lines or store.grows)
    was_short = bool(damaged) and len(damaged[-1].data) < SHORTEST_SHARD_ROW
    said = []
    for seq in sorted((set(range(last + 1)) | set(found.missing)) - set(good)):
        where = f"ledger {found.writer}: row {seq}"
        as_object = as_objects and seq > max(in_file, default=-1)
        name = row_object(found.writer, seq) if as_object else f"{LEDGER}/{found.writer}.jsonl"
        if seq in run_together:
            good[seq] = run_together[seq]
            said.append(f"{where} is whole, but for the newline beside it")
        elif seq in made:
            data = seal({"kind": "shard"} | dataclasses.asdict(made[seq]))
            good[seq] = Line(name, data, seq, [made[seq]], "")
            said.append(f"{where} is made again from {made[seq].shard}")
        elif seq < last or was_short:
            good[seq] = Line(name, _empty(header, found, seq), seq, [], "")
            said.append(f"{where} cannot be made again; an empty row takes its place")
        else:
            said.append(f"{where} cannot be made again; the ledger ends before it")
            break
    return [good[seq] for seq in sorted(good)], said


def strays(store: Store, found: Scan) -> dict[int, list[str]]:
    """Shards by the number of a row that the ledger lacks. After its end, only a writer's: a tool begins anew."""
    last, files = max(found.good, default=-1), dict[int, list[str]]()
    for name in store.names(SHARDS):
        writer, seq = writer_of(name) or ("", -1)
        wanted = writer == found.writer and seq not in found.good and not name.endswith(TEMPORARY)
        if wanted and (seq <= last or seq in found.missing or writer not in TOOLS):
            files.setdefault(seq, []).append(name)
    return files


def _run_together(store: Store, header: CacheHeader, writer: str, damaged: list[Line]) -> dict[int, Line]:
    """Rows that verify within damaged lines: the newline after them, or before them, is not one any more."""
    rows = [(line.name, data + b"\n") for line in damaged for data in _ROW.findall(line.data)]
    return {line.seq: line for name, data in rows if not (line := read_row(store, header, writer, name, data)).error}


def _from_file(store: Store, header: CacheHeader, found: Scan, names: list[str]) -> ShardRow | None:
    others = Counter(row.source for line in found.good.values() for row in line.rows if isinstance(row, ShardRow))
    source = found.writer if found.writer in TOOLS else others.most_common(1)[0][0] if others else None
    for name in names:
        try:
            return row_from_file(store, name, header.identity, source)
        except (ValueError, KeyError, TypeError, IndexError, CacheError):
            continue
    return None


def _empty(header: CacheHeader, found: Scan, seq: int) -> bytes:
    """A row that changes nothing: a tool's retires nothing; a writer's says `finish`, until its next row."""
    row: dict[str, object] = {"writer": found.writer, "seq": seq, "cache": header.identity}
    if found.writer in TOOLS:
        return seal({"kind": "retire"} | row | {"retired": []})
    return seal({"kind": "finish"} | row)
