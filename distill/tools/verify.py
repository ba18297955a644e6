"""Every byte of a cache against its digests. No torch, unless records are decoded."""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from distill.cache.format import SHARDS, shard_name, snapshot_name
from distill.cache.header import CacheHeader, NotReadableHere
from distill.cache.ranks import load_ranks
from distill.cache.shard_header import Replaced
from distill.cache.snapshot import Snapshot, StreamState
from distill.cache.store import Store
from distill.cache.tail import Ranges, replaced_by_tools
from distill.config import json_text
from distill.config.errors import CacheError
from distill.config.terminal import advancing
from distill.config.units import file_size, grouped
from distill.tools.catalog_scan import CatalogScan, disagreement, scan_catalog
from distill.tools.common import add_folder, add_json, blocked_locks, caches, check_at_least_one, is_live
from distill.tools.shard_scan import Place, ShardFiles, ShardScan, examine, shard_files
from distill.tools.token_counter import TokenCounter

_OLD = 256
"""Shards after the newest snapshot that are worth a note."""


class Verdict(NamedTuple):
    """On one cache."""

    problems: list[str]
    """Damage: each names the file, and the sample where it is one record's."""
    notes: list[str]
    """What does no harm: leftovers of a kill, files that a compaction has replaced."""
    shards: int
    """Those that count."""
    samples: int
    """Records in them."""
    bytes: int


def verify(store: Store, *, decode: bool = False, jobs: int = 1) -> Verdict:
    """Reads every file of a cache, shards too that others replace, and writes nothing.

    decode: take every record apart, too. jobs: shards that are verified together.
    """
    try:
        header = CacheHeader.load(store)
    except NotReadableHere:
        raise
    except CacheError as error:
        return Verdict([str(error)], [], 0, 0, 0)
    problems, notes = list[str](), list[str]()
    try:
        load_ranks(store, header)
    except CacheError as error:
        problems.append(str(error))
        decode = False  # without ranks there are no ids
    # The catalog first: whatever a snapshot counts was published before it.
    found = scan_catalog(store, header)
    files = shard_files(store)
    counter = TokenCounter(store, header) if decode else None

    def scanned(name: str) -> ShardScan:
        try:
            return examine(store, header, name, counter=counter, advance=advance)
        except CacheError as error:
            return ShardScan(name, [str(error)])

    with advancing("verify", store.bytes_in(SHARDS)) as advance, ThreadPoolExecutor(max(jobs, 1)) as pool:
        scans = list(pool.map(scanned, files.files))
    gone = replaced_ranges(scans)
    # A compaction at this moment may have removed what it has replaced.
    if any(not store.exists(each.name) for each in scans if each.problems):
        gone = Ranges([*gone.joined(), *replaced_by_tools(store, header, {})])
    good = {each.own: each for each in scans if each.is_whole and each.own is not None and each.own == each.place}
    problems += [problem for each in scans for problem in _problems(store, each, good, gone, notes)]
    problems += _missing(store, scans, found, gone)
    counted = {place: each for place, each in good.items() if place not in gone}
    places = {each.place for each in scans if each.place is not None}
    problems += catalog_problems(store, header, found, places, good, is_sound=not problems).values()
    notes += _notes(store, files, found, good, gone)
    whole = [each.header for each in counted.values() if each.header is not None]
    shards = [each for each in whole if not each.is_mark]
    size = sum(store.size(shard_name(*place)) for place in counted)
    return Verdict(problems, notes, len(shards), sum(each.samples for each in shards), size)


def replaced_ranges(scans: Iterable[ShardScan]) -> Ranges:
    """Shards that do not count any more, by the headers of whole ones."""
    whole = [each.header for each in scans if each.header is not None and each.is_whole and each.own == each.place]
    return Ranges(replaced for header in whole for replaced in header.replaces)


def _problems(
    store: Store, scan: ShardScan, good: dict[Place, ShardScan], gone: Ranges, notes: list[str]
) -> Iterator[str]:
    """Of one file; what does no harm is added to `notes`."""
    path = store.path(scan.name)
    belongs = f"{path}: {scan.belongs}; its name would be {shard_name(*scan.own)}" if scan.own else ""
    if scan.place is None and (scan.own is None or scan.own in good):
        notes.append(belongs or f"{path}: a file that is not part of the cache")
    elif scan.problems and scan.place is not None and scan.place in gone and not store.exists(scan.name):
        return  # a purge has just removed it
    elif scan.own is not None and scan.own != scan.place:
        yield belongs
    if scan.place is not None or not (scan.own is None or scan.own in good):
        yield from scan.problems


def _missing(store: Store, scans: Sequence[ShardScan], found: CatalogScan, gone: Ranges) -> Iterator[str]:
    """Shards that are not there, and that no other replaces."""
    for writer, first, last in found.holes((each.place for each in scans if each.place is not None), gone):
        # A folder's names are not read at one moment: a new shard may be seen before the one in front of it.
        if first < last or not store.exists(shard_name(writer, first)):
            which = f"shards {first} to {last} of writer {writer} are" if last > first else "the shard is"
            yield f"{store.path(shard_name(writer, first))}: {which} missing"


def catalog_problems(
    store: Store, header: CacheHeader, found: CatalogScan, places: Iterable[Place], good: dict[Place, ShardScan], *,
    is_sound: bool,
) -> dict[str, str]:  # fmt: skip
    """Damage of the catalog, and where it differs from the shards, by file.

    places: of all shards that are there. good: those that are whole. is_sound: all are, so that each record may be
    compared.
    """
    problems, newest = dict(found.damaged), found.newest
    for snapshot in found.snapshots:
        if newest is None or snapshot.number > newest.number:
            for ref in snapshot.listings:
                if ref in found.gone:
                    what = f"a listing of snapshot {snapshot.number} is missing"
                    problems[ref.name] = f"{store.path(ref.name)}: {what}"
    if newest is not None and is_sound:
        name, listings = snapshot_name(newest.number), [found.listings[ref] for ref in newest.listings]
        if problem := disagreement(store, header, newest, listings):
            problems[name] = f"{store.path(name)}: {problem}"
    for snapshot, writer, seq in _lacking(found, places, good) if is_sound else ():
        # A purge removes snapshots before it removes what they need.
        if store.exists(name := snapshot_name(snapshot.number)):
            problems[name] = f"{store.path(name)}: {shard_name(writer, seq)}, which it counts, is missing"
    return problems


def _lacking(
    found: CatalogScan, places: Iterable[Place], good: dict[Place, ShardScan]
) -> Iterator[tuple[Snapshot, str, int]]:
    """Snapshots, each with the first shard that a view of it needs and that is not there."""
    there = Ranges(Replaced(*place, place[1]) for place in places).joined()
    tools = [(*place, each.header.replaces) for place, each in good.items() if each.header and each.header.replaces]
    for snapshot in found.snapshots:
        counts = {name: state.count for name, state in snapshot.streams.items()}
        # What a tool had replaced then, no view of the snapshot needs.
        ranges = [each for name, seq, replaces in tools if seq < counts.get(name, 0) for each in replaces]
        gone = Ranges([*there, *ranges])
        lacking = [(snapshot, name, first) for name in counts for first, _ in gone.missing(name, (), counts[name])]
        yield from lacking[:1]


def _notes(
    store: Store, files: ShardFiles, found: CatalogScan, good: dict[Place, ShardScan], gone: Ranges
) -> Iterator[str]:
    """Leftovers, and what waits for a tool."""
    streams = {name.split("/")[1] for name in [*files.files, *files.temporary]}
    live = {writer for writer in streams if is_live(store, writer)}
    for name in [*files.temporary, *files.others, *found.others, *([] if live else found.temporary)]:
        if name.split("/")[1] not in live:
            yield f"{store.path(name)}: not part of the cache"
    for name in blocked_locks(store):
        yield f"{store.path(name)}: expected a lock file; codistill-cache repair moves it away"
    if found.unnamed and not live:
        yield f"{len(found.unnamed)} listings that no snapshot names; compact --purge removes them"
    if waiting := [store.size(each.name) for place, each in good.items() if place in gone]:
        size = file_size(sum(waiting))
        yield f"{len(waiting)} shards of {size} are replaced by others; compact --purge removes them"
    newest = found.newest
    old = [each for each in found.snapshots if newest is not None and each.number < newest.number]
    if less := sum(any(ref in found.gone for ref in each.listings) for each in old):
        yield f"{less} old snapshots name listings that are not there any more; the shards serve views of them"
    streams_seen = newest.streams if newest else {}
    later = sum(place not in gone and place[1] >= streams_seen.get(place[0], StreamState()).count for place in good)
    if later > _OLD:
        yield f"{later} shards came after the newest snapshot; codistill-cache index {store.root} makes one"


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
