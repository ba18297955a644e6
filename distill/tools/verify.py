"""Every byte of a cache against its digests. No torch, unless records are decoded."""

import argparse
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from distill.cache.format import SHARDS, TEMPORARY, row_of
from distill.cache.header import CacheHeader
from distill.cache.ledger import ledgers
from distill.cache.ranks import load_ranks
from distill.cache.store import Store
from distill.config import json_text
from distill.config.errors import CacheError
from distill.config.terminal import advancing
from distill.config.units import file_size, grouped
from distill.tools.common import add_folder, add_json, caches, check_at_least_one, is_live
from distill.tools.ledger_scan import LedgerScan, rows_of, scan_ledger
from distill.tools.shard_scan import examine
from distill.tools.token_counter import TokenCounter


class Verdict(NamedTuple):
    """On one cache."""

    problems: list[str]
    """Damage: each names the file, and the sample where it is one record's."""
    notes: list[str]
    """What does no harm: leftovers of a kill, files that a compaction has replaced."""
    shards: int
    samples: int
    """Records that verify, or would if there were no problem."""
    bytes: int


def verify(store: Store, *, decode: bool = False, jobs: int = 1) -> Verdict:
    """Reads every file of a cache.

    decode: take every record apart, too. jobs: shards that are verified together.
    """
    try:
        header = CacheHeader.load(store)
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
    scans = [scan_ledger(store, name, header) for name in ledgers(store)]
    problems += [problem for each in scans for problem in each.problems]
    notes += [
        f"{store.path(each.torn_in)}: {each.torn} bytes of a row at its end that was not finished"
        for each in scans
        if each.torn and not is_live(store, each.writer)
    ]
    rows, retired = rows_of(scans)
    counter = TokenCounter(store, header) if decode else None
    with advancing("verify", sum(row.bytes for row in rows)) as advance, ThreadPoolExecutor(max(jobs, 1)) as pool:
        for scan in pool.map(lambda row: examine(store, header, row, counter=counter, advance=advance), rows):
            problems += scan.problems
    _strays(store, files, scans, {row.shard for row in rows + retired}, problems, notes)
    there = set(files)
    if replaced := [row for row in retired if row.shard in there]:
        size = file_size(sum(row.bytes for row in replaced))
        notes.append(f"{len(replaced)} shards of {size} are replaced by others; compact --purge removes them")
    return Verdict(problems, notes, len(rows), sum(row.samples for row in rows), sum(row.bytes for row in rows))


def _strays(
    store: Store, files: list[str], scans: list[LedgerScan], known: set[str], problems: list[str], notes: list[str]
) -> None:
    """Files of `shards/` that no row names: a problem where a row must have been lost, a note where a kill explains it.

    A kill can come between a shard's file and its row: then the row would be the ledger's next one.
    """
    following = {each.writer: max(each.good, default=-1) + 1 for each in scans}
    for name in files:
        row = row_of(name)
        if name in known or (row is not None and is_live(store, row.writer)):
            continue
        path = store.path(f"{SHARDS}/{name}")
        if name.endswith(TEMPORARY) or row is None:
            notes.append(f"{path}: a file that is not part of the cache")
        elif row.seq > following.get(row.writer, 0):
            problems.append(f"{path}: the ledger of {row.writer} ends before its row {row.seq}")
        else:
            notes.append(f"{path}: a shard without a row in the ledger, which a kill leaves")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folder(parser)
    add_json(parser)
    parser.add_argument("--decode", action="store_true", help="take every record apart, too")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="shards at a time (%(default)s)")


def run(args: argparse.Namespace) -> int:
    check_at_least_one("--jobs", args.jobs)
    has_problems = False
    for store in caches(args.dir):
        verdict = verify(store, decode=args.decode, jobs=args.jobs)
        has_problems |= bool(verdict.problems)
        if args.json:
            print(json_text.dumps({"folder": store.root} | verdict._asdict()))
            continue
        for problem in verdict.problems:
            print(f"damage: {problem}")
        for note in verdict.notes:
            print(f"note: {note}")
        print(
            f"{store.root}: {f'{len(verdict.problems)} problems' if verdict.problems else 'whole'}; "
            f"{grouped(verdict.samples)} records in {verdict.shards} shards of {file_size(verdict.bytes)}"
        )
    return int(has_problems)
