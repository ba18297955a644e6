"""Makes a damaged cache readable again: what is good stays or is copied, what is not goes to `quarantine/`.

First a plan, from a look at everything; then the plan is carried out, in an order that a kill may cut anywhere, since
the next repair finds what is left to do: ledgers, then good records into shards of the repair's own, then a row that
retires the damaged shards, then their files. Nothing is lost without a line that names the samples.
"""

import argparse
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from distill.cache.format import LEDGER, QUARANTINE, SHARDS, TEMPORARY, row_of, writer_lock
from distill.cache.header import CacheHeader
from distill.cache.ledger import Retired, ShardRow, ledgers, outside
from distill.cache.ranks import load_ranks
from distill.cache.shard import Array
from distill.cache.store import Store
from distill.config.errors import CacheError
from distill.config.terminal import advancing
from distill.tools.common import add_folder, alone, caches, is_live, newest_records
from distill.tools.ledger_scan import LedgerScan, lost_shards, mended, rows_of, scan_ledger
from distill.tools.repack import Packer, portion
from distill.tools.shard_scan import ShardScan, examine, row_from_file
from distill.tools.token_counter import TokenCounter

SHARD_BYTES = 512 << 20


@dataclass
class _Salvage:
    """A shard whose row goes, or that never had one."""

    row: ShardRow
    scan: ShardScan
    has_row: bool
    keep: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    """Places of the good records that are newer than what remains of their samples."""

    @property
    def good(self) -> Array:
        """Places of the records that verify."""
        return np.array([i for i, data in enumerate(self.scan.records) if data is not None], np.int64)


@dataclass
class Repair:
    """What a repair does, or would do; two are equal where that is the same."""

    store: Store = field(compare=False)
    header: CacheHeader
    dry_run: bool = field(compare=False)
    lines: list[str] = field(default_factory=list)
    """Of the report, in the order of the work."""
    lost: list[int] = field(default_factory=list)
    """Samples whose newest record is lost, ascending; those of a shard whose index is lost are in `lines` alone."""
    uncovered: list[int] = field(default_factory=list)
    """Of these: no older record is left."""
    saved: int = 0
    """Records copied out of damaged shards, or published for the first time."""

    @cached_property
    def counter(self) -> TokenCounter:
        return TokenCounter(self.store, self.header)

    def lock_writers(self, locks: contextlib.ExitStack) -> set[str]:
        """Names that no live process has; they are held until the repair is over (dry_run: not at all)."""
        names = set(ledgers(self.store)) | {row.writer for name in self.store.names(SHARDS) if (row := row_of(name))}
        mine = set()
        for name in sorted(names):
            if is_live(self.store, name):
                self.lines.append(f"writer {name} is alive: its ledger and unpublished files are left alone")
                continue
            if not self.dry_run:
                locks.enter_context(self.store.lock(writer_lock(name), f"the writer's name {name!r}"))
            mine.add(name)
        return mine

    def mend_ledger(self, scan: LedgerScan) -> LedgerScan:
        """The ledger as it is afterwards."""
        store = self.store
        if scan.torn:
            self.lines.append(f"{store.path(scan.torn_in)}: a torn last row of {scan.torn} bytes is removed")
            if not self.dry_run and scan.torn_in.endswith(".jsonl"):
                store.truncate(scan.torn_in, store.size(scan.torn_in) - scan.torn)
            elif not self.dry_run:
                store.remove(scan.torn_in)
        if not scan.problems and not lost_shards(store, scan):
            return scan._replace(torn=0)
        lines, messages = mended(store, self.header, scan)
        self.lines += scan.problems + messages
        before = {line.name for line in scan.lines}
        for name in dict.fromkeys(line.name for line in [*scan.lines, *lines]) if not self.dry_run else ():
            data = b"".join(line.data for line in lines if line.name == name)
            if name in before and data == store.read(name):
                continue
            if name in before and scan.problems:
                self._to_quarantine(name, copy=True)
            if data or name.endswith(".jsonl"):
                store.publish(name, data)
            else:
                store.remove(name)
        return LedgerScan(scan.writer, lines, 0, "")

    def damaged(self, rows: Sequence[ShardRow]) -> list[_Salvage]:
        salvages = []
        with advancing("repair", sum(row.bytes for row in rows)) as advance:
            for row in rows:
                if examine(self.store, self.header, row, advance=advance).problems:
                    scan = examine(self.store, self.header, row, keep=True, counter=self.counter)
                    salvages.append(_Salvage(row, scan, has_row=True))
        return salvages

    def strays(self, known: set[str], mine: set[str]) -> tuple[list[_Salvage], list[str]]:
        """Files of `shards/` that no row names: shards that are whole, and names of files that are of no use."""
        salvages, useless = [], []
        for name in self.store.names(SHARDS):
            row = row_of(name)
            if name in known or (row is not None and row.writer not in mine):
                continue
            path = self.store.path(f"{SHARDS}/{name}")
            problem = ""
            if name.endswith(TEMPORARY):
                self.lines.append(f"{path}: a file that was being written is removed")
            elif row is None:
                self.lines.append(f"{path}: not part of a cache; moved to quarantine")
            else:
                try:
                    remade = row_from_file(self.store, name, self.header.identity, None)
                    scan = examine(self.store, self.header, remade, keep=True)
                    problem = "".join(scan.problems[:1])
                except CacheError as error:
                    problem = str(error)
                if not problem:
                    salvages.append(_Salvage(remade, scan, has_row=False))
                    continue
                self.lines.append(f"{path}: a shard without a row, damaged ({problem}); moved to quarantine")
            useless.append(f"{SHARDS}/{name}")
        return salvages, useless

    def left(self, scans: Sequence[LedgerScan], retired: Sequence[ShardRow]) -> list[str]:
        """Files that an earlier repair has retired and not moved."""
        lines = [line for scan in scans if scan.writer == "repair" for line in scan.lines]
        by_repair = [each for line in lines for each in line.rows if isinstance(each, Retired)]
        kept, there = {row.shard for row in outside(list(retired), by_repair)}, set(self.store.names(SHARDS))
        return [f"{SHARDS}/{row.shard}" for row in retired if row.shard in there - kept]

    def settle(self, rows: Sequence[ShardRow], salvages: list[_Salvage]) -> None:
        """Which good records are worth copying, and which samples have lost their newest one."""
        damaged = {each.row.shard for each in salvages}
        whole = [row for row in rows if row.shard not in damaged]
        newest = newest_records(self.store, self.header, whole)
        wanted: dict[int, int] = {}
        """The greatest step of each sample in a damaged shard."""
        # Of the others it cannot be read which samples they had.
        readable = [(each, shard.columns) for each in salvages if (shard := each.scan.shard) is not None]
        for number, (each, columns) in enumerate(readable, start=len(whole)):
            ids, steps_of = columns.sample_ids, columns.steps
            if each.has_row:
                real = (ids >= 0) & (ids < self.header.samples)  # an index that does not verify may hold anything
                for sample, step in zip(ids[real].tolist(), steps_of[real].tolist(), strict=True):
                    wanted[sample] = max(wanted.get(sample, -1), step)
            newer = each.good[newest.steps(ids[each.good]) < steps_of[each.good]]
            newest.add(ids[newer], steps_of[newer])
            each.keep = newer[newest.of(number, ids[newer])]  # of a sample that lies in the shard twice, one record
            self.saved += len(each.keep)
        samples = np.array(sorted(wanted), np.int64)
        left = newest.steps(samples)
        self.lost = samples[left < np.array([wanted[s] for s in samples.tolist()], np.int64)].tolist()
        self.uncovered = samples[left < 0].tolist()

    def report(self, each: _Salvage) -> str:
        path, row = self.store.path(f"{SHARDS}/{each.row.shard}"), each.row
        if not each.has_row:
            return f"{path}: a shard without a row; {len(each.keep)} of its {row.samples} records are published"
        if each.scan.shard is None:
            among = f"{row.samples} among samples {row.first_sample} to {row.last_sample}"
            return f"{path}: nothing can be read of its records, {among}; retired, moved to quarantine"
        ids = each.scan.shard.columns.sample_ids
        bad = sorted(set(ids.tolist()) - set(ids[each.good].tolist()))
        what = f"the records of samples {ranges(bad)} are damaged" if bad else "its file and its row disagree"
        return f"{path}: {what}; {len(each.keep)} records copied, the shard retired and moved to quarantine"

    def carry_out(self, salvages: list[_Salvage], useless: list[str]) -> None:
        packer = Packer(self.store, "repair", self.header.identity, SHARD_BYTES)
        for each in salvages:
            if each.scan.shard is not None and len(each.keep):
                packer.add(portion(each.scan.shard, each.scan.records, each.keep, self.counter))
        packer.flush()
        packer.retire(each.row for each in salvages if each.has_row)
        # A stopped repair may have written the very same files, without their rows.
        published = {f"{SHARDS}/{row.shard}" for row in packer.rows}
        unpublished = [f"{SHARDS}/{each.row.shard}" for each in salvages if not each.has_row]
        damaged = [f"{SHARDS}/{each.row.shard}" for each in salvages if each.has_row]
        for name in [*unpublished, *damaged, *useless]:
            if name in published or not self.store.exists(name):
                continue
            if name in unpublished or name.endswith(TEMPORARY):
                self.store.remove(name)
            else:
                self._to_quarantine(name)

    def _to_quarantine(self, name: str, *, copy: bool = False) -> None:
        """Takes a file out of the cache, or a copy of it, and keeps it under a name that is free."""
        plain = f"{QUARANTINE}/{name.replace('/', '-') if name.startswith(LEDGER) else name.rsplit('/', 1)[-1]}"
        kept, number = plain, 1
        self.store.make_folders(QUARANTINE)
        data = self.store.read(name)
        while self.store.exists(kept) and self.store.read(kept) != data:
            kept, number = f"{plain}.{number}", number + 1
        self.store.publish(kept, data)
        if not copy:
            self.store.remove(name)


def repair(store: Store, *, dry_run: bool = False) -> Repair:
    """Repairs one cache; `verify` has nothing to report afterwards.

    Writers that are alive keep their ledgers and files, but for damaged shards that they have published.

    Raises:
        CacheError: the header or the table of ranks is damaged (they cannot be made again from the rest), another tool
            at work, or a file that cannot be written.
    """
    done = Repair(store, _header(store), dry_run)
    with alone(store, dry_run=dry_run), contextlib.ExitStack() as locks:
        mine = done.lock_writers(locks)
        scans = [scan_ledger(store, name, done.header) for name in sorted({*ledgers(store), *mine})]
        scans = [done.mend_ledger(each) if each.writer in mine else each for each in scans]
        rows, retired = rows_of(scans)
        salvages = done.damaged(rows)
        unpublished, useless = done.strays({row.shard for row in rows + retired}, mine)
        salvages += unpublished
        done.settle(rows, salvages)
        done.lines += [done.report(each) for each in salvages]
        left = done.left(scans, retired)
        stopped = "retired by a repair that was stopped; moved to quarantine"
        done.lines += [f"{store.path(name)}: {stopped}" for name in left]
        if not dry_run:
            done.carry_out(salvages, left + useless)
    return done


def _header(store: Store) -> CacheHeader:
    try:
        header = CacheHeader.load(store)
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


def ranges(numbers: list[int]) -> str:
    """`0 to 4, 7, 9 to 12` of ascending numbers."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{a} to {b}" if b > a else str(a) for a, b in spans)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folder(parser)
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and change nothing")


def run(args: argparse.Namespace) -> int:
    for store in caches(args.dir):
        done = repair(store, dry_run=args.dry_run)
        for line in done.lines:
            print(line)
        outcome = ("would be " if args.dry_run else "") + "repaired" if done.lines else "whole, nothing to do"
        print(f"{store.root}: {outcome}" + (f"; {done.saved} records saved" if done.saved else ""))
        if done.lost:
            older = sorted(set(done.lost) - set(done.uncovered))
            print(f"  lost: newest records of {len(done.lost)} samples: {ranges(done.lost)}")
            if older:
                print(f"  of these an older record is left: {ranges(older)}")
    return 0
