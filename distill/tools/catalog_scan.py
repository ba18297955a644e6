"""The catalog read without trust: every byte of snapshots and listings, and whether they agree with the shards. No
torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from distill.cache.entries import ENTRY, ORIGIN, Array, EntryTable
from distill.cache.format import CATALOG, TEMPORARY, snapshot_name, snapshot_of
from distill.cache.header import CacheHeader
from distill.cache.listing import PIECE, Listing, ListingRef, block_cache
from distill.cache.origins import SOURCES
from distill.cache.snapshot import Snapshot, load_snapshot, snapshot_numbers
from distill.cache.store import Store, is_missing
from distill.cache.tail import Ranges, Tail, read_tail
from distill.cache.view import View
from distill.config.errors import CacheError
from distill.tools.shard_scan import Place, Rows


@dataclass
class CatalogScan:
    """All of a catalog, whatever its state."""

    snapshots: list[Snapshot] = field(default_factory=list)
    """Those that verify, newest first."""
    listings: dict[ListingRef, Listing] = field(default_factory=dict)
    """Those that verify."""
    damaged: dict[str, str] = field(default_factory=dict)
    """What is wrong with a file, by its name."""
    gone: set[ListingRef] = field(default_factory=set)
    """Listings that are not there."""
    temporary: list[str] = field(default_factory=list)
    unnamed: list[str] = field(default_factory=list)
    """Listings that no snapshot names."""
    others: list[str] = field(default_factory=list)
    """Files and folders that are not part of a catalog."""

    @property
    def newest(self) -> Snapshot | None:
        """The snapshot that serves; None: the shards do."""
        usable = (each for each in self.snapshots if all(ref in self.listings for ref in each.listings))
        return next(usable, None)

    def holes(self, places: Iterable[Place], gone: Ranges) -> Iterator[tuple[str, int, int]]:
        """Writer, first and last number of shards that are not there, as `places` says, and that no other replaces.

        A stream goes as far as a shard of it is there, or as any snapshot says.
        """
        streams: dict[str, list[int]] = {name: [] for each in self.snapshots for name in each.streams}
        for writer, seq in places:
            streams.setdefault(writer, []).append(seq)
        for writer, seqs in sorted(streams.items()):
            counts = (each.streams[writer].count for each in self.snapshots if writer in each.streams)
            for first, last in gone.missing(writer, seqs, max([*counts, *(seq + 1 for seq in seqs)])):
                yield writer, first, last


def scan_catalog(store: Store, header: CacheHeader) -> CatalogScan:
    """Reads every byte of the catalog. CacheError only where a file may be good and cannot be read."""
    found = CatalogScan()
    for number in snapshot_numbers(store):
        try:
            snapshot = load_snapshot(store, header.identity, number)
        except CacheError as error:
            found.damaged[snapshot_name(number)] = str(error)
        else:
            found.snapshots += [snapshot] if snapshot is not None else []
    block = block_cache(store)
    for ref in dict.fromkeys(ref for snapshot in found.snapshots for ref in snapshot.listings):
        try:
            if (size := store.size(ref.name)) != ref.bytes:
                raise CacheError(f"{store.path(ref.name)} is damaged: {size} bytes, {ref.bytes} in its snapshot")
            listing = Listing(store, ref, header.identity, block)
            if not _fits(listing):
                raise CacheError(f"{store.path(ref.name)} is damaged: its parts do not fit each other or its snapshot")
            found.listings[ref] = listing
        except CacheError as error:
            if is_missing(error):
                found.gone.add(ref)
            else:
                found.damaged[ref.name] = str(error)
    named = {ref.name for snapshot in found.snapshots for ref in snapshot.listings}
    for name in (f"{CATALOG}/{each}" for each in store.names(CATALOG)):
        if name.endswith(TEMPORARY):
            found.temporary.append(name)
        elif name.endswith(".listing") and name not in named and not store.is_folder(name):
            found.unnamed.append(name)
        elif name not in named and snapshot_of(name.removeprefix(f"{CATALOG}/")) is None:
            found.others.append(name)
    return found


def _fits(listing: Listing) -> bool:
    """Reads all of a listing: whether its numbers are as many as they should be, and name what there is."""
    count, names = 0, listing.names
    fits = True
    for chunk in listing.chunks(PIECE):
        count += len(chunk)
        fits &= int(chunk["origin"].max(initial=0)) < listing.origins
    for rows in listing.origin_chunks():
        fits &= bool((rows["writer"] < len(names.writers)).all() and (rows["teacher"] < len(names.teachers)).all())
        fits &= bool((rows["source"] < len(SOURCES)).all())
    return fits and count == listing.ref.entries


def by_shard(listing: Listing) -> Iterator[tuple[Place, Array]]:
    """The origin rows of each shard in a listing."""
    rows = np.concatenate([np.empty(0, ORIGIN), *listing.origin_chunks()])
    firsts = np.flatnonzero(rows["number"] == 0).tolist()
    for first, end in zip(firsts, [*firsts[1:], len(rows)], strict=True):
        yield listing.names.shard(rows[first]), rows[first:end]


def listed_rows(found: CatalogScan, places: set[Place]) -> dict[Place, Rows]:
    """What listings have of these shards' records: of those that count, or counted once."""
    rows: dict[Place, Rows] = {}
    for listing in found.listings.values() if places else ():
        numbers, origins, seen = dict[Place, int](), {}, 0
        of_row = np.full(listing.origins, -1, np.int64)
        for place, part in by_shard(listing):
            if place in places:
                of_row[seen : seen + len(part)] = numbers.setdefault(place, len(numbers))
                origins[place] = part
            seen += len(part)
        chunks = [chunk[of_row[chunk["origin"]] >= 0] for chunk in listing.chunks(PIECE)] if numbers else []
        entries = np.concatenate([np.empty(0, ENTRY), *chunks])
        of_entry = of_row[entries["origin"]]
        for place, number in numbers.items():
            part = entries[of_entry == number].copy()
            first = int(np.flatnonzero(of_row == number)[0])
            part["origin"] -= first
            before = rows[place].entries if place in rows else np.empty(0, ENTRY)
            merged = np.concatenate([before, part])
            merged = merged[np.unique(merged["start"], return_index=True)[1]]
            theirs = origins[place]
            rows[place] = Rows(merged, int(theirs[0]["records_at"]), tuple(map(listing.names.origin, theirs)))
    return rows


def disagreement(store: Store, header: CacheHeader, newest: Snapshot, listings: Sequence[Listing]) -> str:
    """Where a snapshot has another record of a sample, or origin, than its shards, which are whole; "": nowhere."""
    alone = View(store, header, newest, tuple(listings), (), (), {}, block_cache(store))
    limits = {name: state.count for name, state in newest.streams.items()}
    tail, is_last, count, first, seen = Tail([], {}, []), False, 0, header.samples, 0
    while not is_last:
        states = tail.states
        tail = read_tail(store, header, states, limits, limits=limits, most=PIECE, replaced=tail.replaced)
        is_last, table = tail.states == states, EntryTable.of_shards(tail.shards)
        # The table's records are found where a later one, or the same one, is not in the listings.
        records = dataclasses.replace(alone, tables=(table,)).find(table.entries["sample"])
        rows, entries, mine = records.rows, records.entries, table.origin_rows(table.entries["origin"])
        for number, listing in enumerate(listings):
            here = records.tables == number
            rows[here] = listing.names.into(table.names, rows[here])
        is_same_shard = (rows["writer"] == mine["writer"]) & (rows["seq"] == mine["seq"])
        entries["origin"] = table.entries["origin"]
        differs = is_same_shard & (_differs(entries, table.entries) | _differs(rows, mine))
        differs |= records.tables == len(listings)
        count, first = count + int(differs.sum()), int(table.entries["sample"][differs].min(initial=first))
        seen += int(is_same_shard.sum())
    if count:
        return f"its listings have other records than the shards of {count} samples, {first} the first of them"
    return f"its listings have {alone.covered - seen} records that no shard has" if alone.covered != seen else ""


def _differs(some: Array, others: Array) -> Array:
    """Which rows have other bytes."""
    differs: Array = some.view(f"V{some.itemsize}") != others.view(f"V{some.itemsize}")
    return differs
