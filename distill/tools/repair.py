"""Makes a damaged cache readable again: what is good stays, or goes into a shard of the same name; what is not is moved
to `quarantine/`.

First a plan, from a look at everything. What will be lost is written to a report before anything changes. Then the plan
is carried out in an order that a kill may cut anywhere: the next repair takes up what lies in quarantine and whose
place is empty, and prints the report of the one that was stopped, too.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
import sys
from collections.abc import Callable
from functools import partial
from itertools import count

from distill.cache import cataloging
from distill.cache.format import QUARANTINE, shard_name, snapshot_name
from distill.cache.header import CacheHeader, NoCache, NotReadableHere
from distill.cache.publish import publish_mark
from distill.cache.ranks import load_ranks
from distill.cache.seal import seal, unseal
from distill.cache.store import Store
from distill.cache.tail import writers_of
from distill.config.errors import CacheError
from distill.tools.common import add_folder, alone, caches
from distill.tools.repair_plan import Look, Repair, ranges
from distill.tools.salvage import write
from distill.tools.shard_scan import Place

_UNFINISHED = ".unfinished"
_NEW = ".salvaged"

# ---------------------------------------------------------------- the work


def _carry_out(store: Store, look: Look) -> None:
    """Shards of what is good are written first; then each file goes, and what replaces it takes its name."""
    plan, header = look.plan, look.header
    for made, source in plan.salvages:
        write(store, header, made, f"{QUARANTINE}/{shard_name(*made.place)}{_NEW}", source, look.counter)
    moved: list[tuple[str, Place]] = []
    for move in plan.moves:
        name = _free(store, f"{QUARANTINE}/{move.aside}") if move.aside else move.name
        if move.aside:
            store.move(move.name, name)
        if move.to is not None:
            moved.append((name, move.to))
    for made, _ in plan.salvages:
        moved.append((f"{QUARANTINE}/{shard_name(*made.place)}{_NEW}", made.place))
    for name, place in moved:
        store.move(name, shard_name(*place))
    for (writer, seq), state in plan.marks:
        kind, source = ("end", state.source) if state.finished else ("gap", "repair")
        publish_mark(store, header.identity, writer, seq, kind, source, state.step if state.finished else -1)
    for name in plan.removed:
        store.remove(name)


def _free(store: Store, name: str) -> str:
    """A name in quarantine that no file has."""
    names = set(store.names(name.rsplit("/", 1)[0]))
    for number in count():
        kept = name if not number else f"{name}.{number}"
        if kept.rsplit("/", 1)[1] not in names:
            return kept
    raise AssertionError


def _renew_catalog(store: Store, look: Look) -> None:
    """A snapshot of the shards as they are now; then those of shards as they were go, and what is damaged.

    Of live writers, which may be merging them, the listings stay until a purge.
    """
    found = look.found
    try:
        cataloging.update(store, look.header, is_rebuilding=True)
    except CacheError as error:
        if not look.done.left:
            raise
        look.done.lines.append(f"the catalog is not made anew: {error}")
    for snapshot in found.snapshots:
        store.remove(snapshot_name(snapshot.number))
    for ref in found.listings if not look.live else ():
        store.remove(ref.name)
    for name in found.damaged:
        if store.exists(name):
            store.move(name, _free(store, f"{QUARANTINE}/{name}"))


# ---------------------------------------------------------------- reports


def _reports(store: Store) -> list[str]:
    return [each for each in store.names(QUARANTINE) if re.fullmatch(r"repair-\d{6}\.json(\.unfinished)?", each)]


def _stopped(store: Store) -> Repair:
    """What the reports of repairs that were stopped say."""
    done = Repair()
    for name in _reports(store):
        if name.endswith(_UNFINISHED):
            try:
                done.add(Repair(**unseal(store.read(f"{QUARANTINE}/{name}"))))
            except (ValueError, TypeError, RecursionError) as error:
                done.lines.append(f"{store.path(f'{QUARANTINE}/{name}')}: a report that is damaged ({error!s:.200})")
    return done


def _write_report(store: Store, done: Repair) -> str:
    number = max((int(name[7:13]) for name in _reports(store)), default=-1) + 1
    name = f"{QUARANTINE}/repair-{number:06d}.json{_UNFINISHED}"
    store.publish(name, seal(dataclasses.asdict(done), indent=1))
    return name


# ---------------------------------------------------------------- the command


def repair(store: Store, *, dry_run: bool = False, report: Callable[[Repair], None] = lambda done: None) -> Repair:
    """Repairs one cache; `verify` finds no damage afterwards.

    Streams of writers that are alive are left alone. dry_run: nothing is written, not even a lock. report: is given the
    result; where it does not return, as in a process that is killed, the next repair has the same to report.

    Raises:
        CacheError: the header or the table of ranks is damaged (they cannot be made again from the rest), another tool
            at work, or a file that cannot be read or written.
    """
    header = _header(store)
    with alone(store, dry_run=dry_run), contextlib.ExitStack() as locks:
        look = Look(store, header, None if dry_run else locks)
        look.place_strangers()
        look.fill_places()
        look.count_losses()
        look.tidy()
        before = _stopped(store)
        is_renewing = bool(look.plan.moves or look.plan.marks or look.plan.salvages or look.problems)
        is_renewing |= bool(before.lines) or (look.found.newest is None and bool(look.found.snapshots))
        look.done.add(before)
        if not dry_run and (look.plan.removed or is_renewing):
            name = _write_report(store, look.done)
            _carry_out(store, look)
            if is_renewing:
                _renew_catalog(store, look)
            look.done.report = store.path(name.removesuffix(_UNFINISHED))
        report(look.done)
        for each in _reports(store) if not dry_run else ():
            if each.endswith(_UNFINISHED):
                store.move(f"{QUARANTINE}/{each}", f"{QUARANTINE}/{each.removesuffix(_UNFINISHED)}")
    return look.done


def _header(store: Store) -> CacheHeader:
    try:
        header = CacheHeader.load(store)
        load_ranks(store, header)
    except CacheError as error:
        if isinstance(error, NotReadableHere) or (isinstance(error, NoCache) and not writers_of(store)):
            raise
        raise CacheError(
            f"{error}; this cannot be made again from the rest of the cache. The same job, begun in another folder, "
            "writes the same cache.json and ranks file byte for byte: copy them from there (every shard's header has "
            "the digest of the right cache.json)"
        ) from error
    return header


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folder(parser)
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and change nothing")


def run(args: argparse.Namespace) -> int:
    has_lost = False
    for store in caches(args.dir):
        done = repair(store, dry_run=args.dry_run, report=partial(_print, store.root, args.dry_run))
        has_lost |= bool(done.lost or done.unnamed or done.left)
    return int(has_lost)


def _print(folder: str, dry_run: bool, done: Repair) -> None:
    for line in done.lines:
        print(line)
    outcome = ("would be " if dry_run else "") + "repaired" if done.lines else "whole, nothing to do"
    print(f"{folder}: {outcome}" + (f"; {done.saved} records saved" if done.saved else ""))
    if done.lost:
        older = sorted(set(done.lost) - set(done.uncovered))
        print(f"  lost: newest records of {len(done.lost)} samples: {ranges(done.lost)}")
        if older:
            print(f"  of these an older record is left: {ranges(older)}")
    if done.unnamed:
        print(f"  lost: records of {done.unnamed} shards, of samples that are not known")
    if done.report:
        print(f"  the report is {done.report}")
    sys.stdout.flush()
