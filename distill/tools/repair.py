"""Makes a damaged cache readable again: what is good stays or is copied, what is not goes to `quarantine/`.

First a plan, from a look at everything; then the plan is carried out, in an order that a kill may cut anywhere, since
the next repair finds what is left to do: ledgers, then good records into shards of the repair's own, then a row that
retires the damaged shards, then their files. Nothing is lost without a line that says which samples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from distill.cache.format import LEDGER, SHARDS, TEMPORARY, writer_lock
from distill.cache.header import CacheHeader
from distill.cache.ledger import Retired, ShardRow, ledgers, outside
from distill.cache.ranks import load_ranks
from distill.cache.shard import Array, Shard
from distill.cache.store import Store
from distill.cache.view import Newest
from distill.config.errors import CacheError
from distill.tools.common import Bar, ToolLedger, alone, is_live, ranges, to_quarantine, writer_of
from distill.tools.compact import runs
from distill.tools.decoding import Decoding
from distill.tools.ledger_rows import mended, strays
from distill.tools.repack import Packer, piece
from distill.tools.scan import Scan, examine, row_from_file, rows_of, scan

SHARD_BYTES = 512 << 20


@dataclass
class _Salvage:
    """A shard whose row goes, or that never had one."""

    row: ShardRow
    shard: Shard | None
    good: Array
    """Places of the records that verify."""
    records: list[bytes | None]
    has_row: bool
    keep: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    """Of the good ones, those that are newer than what remains of their samples."""


@dataclass
class Repair:
    """What a repair does, or would do."""

    lines: list[str] = field(default_factory=list)
    """Of the report, in the order of the work."""
    lost: list[int] = field(default_factory=list)
    """Samples whose newest record is lost, ascending; those of a shard whose index is lost are in `lines` alone."""
    uncovered: list[int] = field(default_factory=list)
    """Of these: no older record is left."""
    saved: int = 0
    """Records copied out of damaged shards, or published for the first time."""


def repair(store: Store, *, dry_run: bool = False) -> Repair:
    """Repairs one cache; `verify` finds nothing to complain of afterwards.

    Writers that are alive keep their ledgers and files, but for damaged shards that they have published.

    Raises:
        CacheError: the header or the table of ranks is damaged (they cannot be made again from the rest),
            another tool at work, or a file that cannot be written.
    """
    header = _header(store)
    with alone(store, dry_run=dry_run), contextlib.ExitStack() as locks:
        done = Repair()
        mine = _lock_writers(store, locks, done, dry_run)
        scans = [scan(store, name, header) for name in sorted({*ledgers(store), *mine})]
        scans = [_mend_ledger(store, header, each, done, dry_run) if each.writer in mine else each for each in scans]
        rows, retired = rows_of(scans)
        salvages = _examine(store, header, rows) + _strays(store, header, {r.shard for r in rows + retired}, mine, done)
        _settle(header, store, rows, salvages, done)
        for each in salvages:
            done.lines += _told(store, each)
        left = _left(store, scans, retired)
        done.lines += [
            f"{store.path(name)}: retired by a repair that was stopped; moved to quarantine" for name in left
        ]
        if not dry_run:
            _carry_out(store, header, salvages)
            for name in left:
                to_quarantine(store, name)
            _sweep(store, header, mine)
    return done


def _header(store: Store) -> CacheHeader:
    try:
        header = CacheHeader.read(store)
        load_ranks(store, header)
    except CacheError as error:
        if "no cache here" in str(error) and not store.names(LEDGER):
            raise
        raise CacheError(
            f"{error}; this cannot be made again from the rest of the cache. The same job, begun in another folder, "
            "writes the same cache.json and ranks file byte for byte: copy them from there (every row of the ledgers "
            "names the digest of the right cache.json)"
        ) from error
    return header


def _lock_writers(store: Store, locks: contextlib.ExitStack, done: Repair, dry_run: bool) -> set[str]:
    """Names that no live process has; they are held until the repair is over (dry_run: not at all)."""
    names = set(ledgers(store)) | {found[0] for name in store.names(SHARDS) if (found := writer_of(name))}
    mine = set()
    for name in sorted(names):
        if is_live(store, name):
            done.lines.append(f"writer {name} is alive: its ledger and unpublished files are left alone")
            continue
        if not dry_run:
            locks.enter_context(store.lock(writer_lock(name), f"the writer's name {name!r}"))
        mine.add(name)
    return mine


def _mend_ledger(store: Store, header: CacheHeader, found: Scan, done: Repair, dry_run: bool) -> Scan:
    """The ledger as it is afterwards."""
    if found.torn:
        done.lines.append(f"{store.path(found.torn_in)}: a torn last row of {found.torn} bytes is removed")
        if not dry_run and found.torn_in.endswith(".jsonl"):
            store.truncate(found.torn_in, store.size(found.torn_in) - found.torn)
        elif not dry_run:
            store.remove(found.torn_in)
    if not found.problems and not strays(store, found):
        return found._replace(torn=0)
    done.lines += found.problems
    lines, said = mended(store, header, found)
    done.lines += said
    if not dry_run:
        for name in dict.fromkeys(line.name for line in found.lines):
            data = b"".join(line.data for line in lines if line.name == name)
            old = store.read(name)
            if data != old:
                if found.problems:
                    to_quarantine(store, name, copy=True)
                if data or name.endswith(".jsonl"):
                    store.publish(name, data)
                else:
                    store.remove(name)
        for name in dict.fromkeys(line.name for line in lines):
            if not any(line.name == name for line in found.lines):
                store.publish(name, b"".join(line.data for line in lines if line.name == name))
    return Scan(found.writer, lines, 0, "")


def _examine(store: Store, header: CacheHeader, rows: Sequence[ShardRow]) -> list[_Salvage]:
    found = []
    decoding = Decoding(store, header)
    with Bar("repair", sum(row.bytes for row in rows)) as bar:
        for row in rows:
            if examine(store, header, row, progress=bar.add).problems:
                shard, records, _ = examine(store, header, row, keep=True, bad=decoding.undecodable)
                found.append(_salvage(row, shard, records, has_row=True))
    return found


def _salvage(row: ShardRow, shard: Shard | None, records: list[bytes | None], *, has_row: bool) -> _Salvage:
    good = np.array([i for i, data in enumerate(records) if data is not None], np.int64)
    return _Salvage(row, shard, good, records, has_row)


def _strays(store: Store, header: CacheHeader, known: set[str], mine: set[str], done: Repair) -> list[_Salvage]:
    """Files of `shards/` that no row names: whole shards are good records."""
    found = []
    for name in store.names(SHARDS):
        writer = writer_of(name)
        if name in known or (writer is not None and writer[0] not in mine):
            continue
        path = store.path(f"{SHARDS}/{name}")
        if name.endswith(TEMPORARY):
            done.lines.append(f"{path}: a file that was being written is removed")
        elif writer is None:
            done.lines.append(f"{path}: not part of a cache; moved to quarantine")
        else:
            try:
                row = row_from_file(store, name, header.identity, None)
                shard, records, problems = examine(store, header, row, keep=True)
            except (ValueError, KeyError, TypeError, IndexError, CacheError) as error:
                done.lines.append(f"{path}: a shard without a row, damaged ({error}); moved to quarantine")
                continue
            if problems:
                done.lines.append(f"{path}: a shard without a row, damaged ({problems[0]}); moved to quarantine")
            else:
                found.append(_salvage(row, shard, records, has_row=False))
    return found


def _left(store: Store, scans: Sequence[Scan], retired: Sequence[ShardRow]) -> list[str]:
    """Files that an earlier repair has retired and not moved."""
    ranges = [
        each
        for found in scans
        if found.writer == "repair"
        for line in found.lines
        for each in line.rows
        if isinstance(each, Retired)
    ]
    there = set(store.names(SHARDS))
    kept = {(row.writer, row.seq) for row in outside(list(retired), ranges)}
    return [f"{SHARDS}/{row.shard}" for row in retired if (row.writer, row.seq) not in kept and row.shard in there]


def _settle(
    header: CacheHeader, store: Store, rows: Sequence[ShardRow], salvages: list[_Salvage], done: Repair
) -> None:
    """Which good records are worth copying, and which samples have lost their newest one."""
    damaged = {each.row.shard for each in salvages}
    newest = Newest(header.samples)
    for row in rows:
        if row.shard not in damaged:
            columns = Shard(store, row).columns
            newest.add(columns.sample_ids, columns.steps)
    wanted: dict[int, int] = {}
    for each in salvages:
        if each.shard is None:
            continue  # which samples it had is not known
        ids, steps_of = each.shard.columns.sample_ids, each.shard.columns.steps
        if each.has_row:
            real = (ids >= 0) & (ids < header.samples)  # an index that does not verify may say anything
            _note(wanted, ids[real].tolist(), steps_of[real].tolist())
        keep = each.good[newest.steps(ids[each.good]) < steps_of[each.good]]
        # Of a sample that lies in the shard twice the later record counts.
        last = {int(ids[i]): i for i in sorted(keep.tolist(), key=lambda i: (int(steps_of[i]), i))}
        each.keep = np.array(sorted(last.values()), np.int64)
        newest.add(ids[each.keep], steps_of[each.keep])
        done.saved += len(each.keep)
    samples = np.array(sorted(wanted), np.int64)
    left = newest.steps(samples)
    lost = samples[left < np.array([wanted[s] for s in samples.tolist()], np.int64)]
    done.lost = lost.tolist()
    done.uncovered = samples[left < 0].tolist()


def _note(wanted: dict[int, int], ids: Sequence[int], steps: Sequence[int]) -> None:
    for sample, step in zip(ids, steps, strict=True):
        wanted[sample] = max(wanted.get(sample, -1), step)


def _told(store: Store, each: _Salvage) -> list[str]:
    path = store.path(f"{SHARDS}/{each.row.shard}")
    if not each.has_row:
        return [f"{path}: a shard without a row; {len(each.keep)} of its {each.row.samples} records are published"]
    if each.shard is None:
        among = f"{each.row.samples} among samples {each.row.first_sample} to {each.row.last_sample}"
        return [f"{path}: nothing can be read of its records, {among}; retired, moved to quarantine"]
    ids = each.shard.columns.sample_ids
    bad = sorted(set(ids.tolist()) - set(ids[each.good].tolist()))
    what = f"the records of samples {ranges(bad)} are damaged" if bad else "its file and its row disagree"
    return [f"{path}: {what}; {len(each.keep)} records copied, the shard retired and moved to quarantine"]


def _carry_out(store: Store, header: CacheHeader, salvages: list[_Salvage]) -> None:
    ledger = ToolLedger(store, "repair", header.identity)
    packer = Packer(ledger, SHARD_BYTES)
    decoding = Decoding(store, header)
    for each in salvages:
        if each.shard is not None and len(each.keep):
            packer.add(piece(each.shard, each.records, each.keep, decoding.tokens))
    packer.flush()
    if retired := runs(each.row for each in salvages if each.has_row):
        ledger.get().retire(retired)
    published = {row.shard for row in packer.rows}
    for each in salvages:
        name = f"{SHARDS}/{each.row.shard}"
        if each.row.shard in published:
            continue  # a stopped repair had written the very same file, without its row
        if each.has_row and store.exists(name):
            to_quarantine(store, name)
        elif not each.has_row:
            store.remove(name)


def _sweep(store: Store, header: CacheHeader, mine: set[str]) -> None:
    """What is in `shards/` and of no use: temporary files go, the rest to quarantine."""
    rows, retired = rows_of([scan(store, name, header) for name in ledgers(store)])
    known = {row.shard for row in rows + retired}
    for name in store.names(SHARDS):
        writer = writer_of(name)
        if name in known or (writer is not None and writer[0] not in mine):
            continue
        if name.endswith(TEMPORARY):
            store.remove(f"{SHARDS}/{name}")
        else:
            to_quarantine(store, f"{SHARDS}/{name}")
