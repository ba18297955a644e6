"""Every byte of a cache against its digests. No torch, unless records are decoded."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from distill.cache.format import SHARDS, TEMPORARY
from distill.cache.header import CacheHeader
from distill.cache.ledger import ShardRow, ledgers
from distill.cache.ranks import load_ranks
from distill.cache.store import Store
from distill.config.errors import CacheError
from distill.tools.common import Bar, is_live, writer_of
from distill.tools.scan import Scan, examine, rows_of, scan


class Verdict(NamedTuple):
    """What was found."""

    problems: list[str]
    """Damage: each names the file, and the sample where it is one record's."""
    notes: list[str]
    """What does no harm: leftovers of a kill, files that a compaction has replaced."""
    shards: int
    samples: int
    """Records that verify, or would if there were no problem."""
    bytes: int


def verify(store: Store, *, decode: bool = False, jobs: int = 1) -> Verdict:
    """Looks at every file of a cache.

    decode: take every record apart, too. jobs: shards that are looked at together.
    """
    try:
        header = CacheHeader.read(store)
    except CacheError as error:
        return Verdict([str(error)], [], 0, 0, 0)
    problems, notes = [], []
    try:
        load_ranks(store, header)
    except CacheError as error:
        problems.append(str(error))
        decode = False  # without ranks there are no ids
    # Files first: a shard that is published meanwhile then has its row.
    files = store.names(SHARDS)
    scans = [scan(store, name, header) for name in ledgers(store)]
    problems += [problem for each in scans for problem in each.problems]
    notes += [
        f"{store.path(each.torn_in)}: {each.torn} bytes of a row at its end that was not finished"
        for each in scans
        if each.torn and not is_live(store, each.writer)
    ]
    rows, retired = rows_of(scans)
    problems += _shards(store, header, rows, decode, jobs)
    lost, left = strays(store, files, scans, rows + retired)
    problems += lost
    notes += left
    there = set(files)
    replaced = [row for row in retired if row.shard in there]
    if replaced:
        size = sum(row.bytes for row in replaced)
        notes.append(
            f"{len(replaced)} shards of {size / 1e6:.1f} MB are replaced by others; compact --purge removes them"
        )
    return Verdict(problems, notes, len(rows), sum(row.samples for row in rows), sum(row.bytes for row in rows))


def _shards(store: Store, header: CacheHeader, rows: list[ShardRow], decode: bool, jobs: int) -> list[str]:
    bad: Callable[[list[bytes], list[int]], list[int]] | None = None
    if decode:
        from distill.tools.decoding import Decoding  # torch

        bad = Decoding(store, header).undecodable
    with Bar("verify", sum(row.bytes for row in rows)) as bar, ThreadPoolExecutor(max(jobs, 1)) as pool:

        def look(row: ShardRow) -> list[str]:
            return examine(store, header, row, bad=bad, progress=bar.add).problems

        return [problem for found in pool.map(look, rows) for problem in found]


def strays(store: Store, files: list[str], scans: list[Scan], rows: list[ShardRow]) -> tuple[list[str], list[str]]:
    """Files of `shards/` that no row names: those that tell of lost rows, and those that a kill explains.

    A kill can come between a shard's file and its row: then the row would be the ledger's next one.
    """
    known = {row.shard for row in rows}
    following = {each.writer: max(each.good, default=-1) + 1 for each in scans}
    lost, left = [], []
    for name in files:
        if name in known:
            continue
        path = store.path(f"{SHARDS}/{name}")
        found = writer_of(name)
        if found is not None and is_live(store, found[0]):
            continue
        if name.endswith(TEMPORARY) or found is None:
            left.append(f"{path}: a file that is not part of the cache")
        elif found[1] > following.get(found[0], 0):
            lost.append(f"{path}: the ledger of {found[0]} ends before its row {found[1]}")
        else:
            left.append(f"{path}: a shard without a row in the ledger, which a kill leaves")
    return lost, left
