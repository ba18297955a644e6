"""The catalog read without trust: every byte of snapshots and listings, and whether they agree with the shards. No
torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from distill.cache.cataloging import PIECE
from distill.cache.entries import ENTRY, ORIGIN, Array, Names, entries_of, newest, origin_rows, ranks
from distill.cache.format import CATALOG, TEMPORARY, snapshot_name, snapshot_of
from distill.cache.header import CacheHeader
from distill.cache.listing import Listing, ListingRef, block_cache
from distill.cache.origins import SOURCES
from distill.cache.shard import Shard
from distill.cache.snapshot import Snapshot, load_snapshot, snapshot_numbers
from distill.cache.store import Store, is_missing
from distill.config.errors import CacheError
from distill.tools.shard_scan import Place, Rows, rows_key


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

    def count(self, writer: str) -> int:
        """How far any snapshot says that a stream goes."""
        states = (each.streams.get(writer) for each in self.snapshots)
        return max((state.count for state in states if state is not None), default=0)


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


def stale(listing: Listing, keys: Mapping[Place, int]) -> list[Place]:
    """Shards, of those in `keys`, of which a listing has other origins than they have; keys: of `ShardScan.key`."""
    return [place for place, rows in by_shard(listing) if keys.get(place, key := rows_key(rows, listing.names)) != key]


def by_shard(listing: Listing) -> Iterator[tuple[Place, Array]]:
    """The origin rows of each shard in a listing."""
    rows = np.concatenate([np.empty(0, ORIGIN), *listing.origin_chunks()])
    firsts = np.flatnonzero(rows["number"] == 0).tolist()
    for first, end in zip(firsts, [*firsts[1:], len(rows)], strict=True):
        row = rows[first]
        yield (listing.names.writers[row["writer"]], int(row["seq"])), rows[first:end]


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


def disagreements(
    store: Store, header: CacheHeader, listings: Sequence[Listing], shards: Sequence[Place]
) -> Iterator[str]:
    """Samples of which these listings have another record than these shards, which are whole.

    In parts, of about 2 million samples each, so that memory is bounded.
    """
    count = -(-max(sum(each.entries for each in listings), 1) // PIECE)
    for part in range(count):
        names = Names([], [])
        opened = (Shard(store, header, *place) for place in shards)
        mine = ((origin_rows(shard, names), [entries_of(shard, 0)]) for shard in opened)
        theirs = ((_origins(listing, names), listing.chunks(PIECE)) for listing in listings)
        here, there = _counting(mine, names, part, count), _counting(theirs, names, part, count)
        if here.tobytes() != there.tobytes():
            differ = np.setxor1d(here, there)["sample"]
            yield f"{len(np.unique(differ))} samples, {int(differ.min())} the first of them"


def _origins(listing: Listing, names: Names) -> Array:
    return np.concatenate([np.empty(0, ORIGIN), *(listing.names.into(names, each) for each in listing.origin_chunks())])


def _counting(tables: Iterable[tuple[Array, Iterable[Array]]], names: Names, part: int, count: int) -> Array:
    """Of every `count`-th sample the entry that counts, with the place of its origin among all in order.

    tables: origin rows and entries.
    """
    parts, all_rows, seen = [np.empty(0, ENTRY)], [np.empty(0, ORIGIN)], 0
    for rows, chunks in tables:
        for chunk in chunks:
            entries = chunk[chunk["sample"] % count == part]
            entries["origin"] += seen
            parts.append(entries)
        all_rows.append(rows)
        seen += len(rows)
    origins = np.concatenate(all_rows)
    order = ranks(origins, names)
    entries = newest(np.concatenate(parts), order)
    entries["origin"] = order[entries["origin"]]
    return entries
