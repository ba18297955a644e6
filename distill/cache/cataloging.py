"""Makes listings and snapshots from the shards. No torch."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Sequence

from distill.cache.entries import EntryTable, replaced_rows
from distill.cache.format import shard_name, snapshot_name
from distill.cache.header import CacheHeader
from distill.cache.listing import PIECE, Listing, ListingDamaged, ListingRef, block_cache
from distill.cache.listing_writer import write_listing
from distill.cache.loss_curve import LossSums
from distill.cache.shard import read_front
from distill.cache.shard_header import Replaced
from distill.cache.snapshot import Snapshot, publish_snapshot, snapshot_numbers, valid_snapshots
from distill.cache.store import Store
from distill.cache.tail import read_tail, writers_of
from distill.config.errors import CacheError

log = logging.getLogger(__name__)

_ALIKE = 4
"""Listings of one size that a writer leaves side by side before it makes them one."""
_LARGEST = 1 << 22
"""Samples of the largest listing that a writer makes of others; larger ones are work for `compact` and `index`."""


def update(
    store: Store, header: CacheHeader, writers: Iterable[str] | None = None, *, is_merging: bool = False,
    is_rebuilding: bool = False,
) -> Snapshot:  # fmt: skip
    """Makes the next snapshot, with what these writers have published; returns it, or the newest one if it has all.

    writers: None for all, those of tools included, as also where the newest snapshot cannot be used; then listings
    are read through before they are used. is_merging: all listings become one. is_rebuilding: from the shards alone.

    Raises:
        CacheError: damage, or it cannot be written.
    """
    while True:
        # Before the base is read: what another process makes of that base meanwhile takes the number.
        number = max(snapshot_numbers(store), default=-1) + 1
        base = Snapshot(header.identity) if is_rebuilding else _newest_usable(store, header, is_whole=writers is None)
        streams = writers_of(store) if writers is None or base.number < number - 1 or not number else list(writers)
        made: list[ListingRef] = []
        try:
            snapshot = _next(store, header, base, streams, is_merging, made)
            if snapshot is None and (is_rebuilding or base.number == number - 1):
                return base
            snapshot = dataclasses.replace(snapshot or base, number=number)
            is_published = publish_snapshot(store, snapshot)
        except CacheError:
            if not store.exists(snapshot_name(number)):  # else it may be this one, in spite of the error
                _remove(store, made)
            raise
        _remove(store, [each for each in made if not (is_published and each in snapshot.listings)])
        if is_published:
            return snapshot


def _remove(store: Store, listings: Iterable[ListingRef]) -> None:
    for each in listings:
        store.remove(each.name)


def _next(
    store: Store, header: CacheHeader, base: Snapshot, writers: list[str], is_merging: bool, made: list[ListingRef]
) -> Snapshot | None:
    """The snapshot after `base`; None: there would be nothing new. made: gets what is written."""
    listings, states, replaced = list(base.listings), dict(base.streams), list[Replaced]()
    while True:
        tail = read_tail(store, header, states, writers, most=PIECE, replaced=replaced)
        replaced = tail.replaced
        if any(shard.header.samples or shard.header.losses.json() for shard in tail.shards):
            losses = LossSums.total(shard.header.losses for shard in tail.shards)
            made.append(write_listing(store, header.identity, [EntryTable.of_shards(tail.shards)], losses))
            listings.append(made[-1])
        is_last = tail.states == states
        states = tail.states
        if is_last:
            break
    if replaced or (is_merging and len(listings) > 1):
        made.append(_merged(store, header, listings, replaced))
        listings = made[-1:]
    else:
        listings = _tiered(store, header, listings, made)
    if states == base.streams and tuple(listings) == base.listings:
        return None
    return Snapshot(header.identity, base.number, 0, states, tuple(listings))


def _merged(store: Store, header: CacheHeader, refs: Sequence[ListingRef], drop: Sequence[Replaced] = ()) -> ListingRef:
    """One listing of several, without the shards that others replace."""
    block = block_cache(store)
    listings = [Listing(store, ref, header.identity, block) for ref in refs]
    losses = LossSums.total((each.losses for each in listings), _losses_of(store, header, listings, drop))
    return write_listing(store, header.identity, listings, losses, drop)


def _losses_of(
    store: Store, header: CacheHeader, listings: Sequence[Listing], drop: Sequence[Replaced]
) -> Iterator[LossSums]:
    """Of those listed shards that are left out: the shards that replace them have the same sums."""
    for listing in listings if drop else ():
        for rows in listing.origin_chunks():
            for row in rows[replaced_rows(rows, listing.names, drop) & (rows["number"] == 0)]:
                place = listing.names.shard(row)
                try:
                    yield read_front(store, header, *place).header.losses
                except CacheError as error:
                    log.warning("%s: its losses count twice (%s)", shard_name(*place), error)


def _tiered(store: Store, header: CacheHeader, listings: list[ListingRef], made: list[ListingRef]) -> list[ListingRef]:
    """The newest listings as one, where there are several of about one size, so that there are few in all."""
    while True:
        alike = [listings.pop()] if listings else []
        while listings and listings[-1].entries < 2 * alike[0].entries:
            alike.append(listings.pop())
        alike.reverse()
        if len(alike) < _ALIKE or sum(each.entries for each in alike) > _LARGEST:
            return [*listings, *alike]
        try:
            made.append(_merged(store, header, alike))
        except ListingDamaged as error:
            log.warning("%s; it stays as it is: codistill-cache index makes a new one", error)
            return [*listings, *alike]
        listings.append(made[-1])


def _newest_usable(store: Store, header: CacheHeader, *, is_whole: bool) -> Snapshot:
    """The newest snapshot whose listings can be opened; is_whole: and all of whose blocks verify."""
    for snapshot in valid_snapshots(store, header.identity):
        try:
            for ref in snapshot.listings:
                listing = Listing(store, ref, header.identity, block_cache(store))
                if is_whole:
                    listing.check()
            return snapshot
        except CacheError as error:
            log.warning("%s; the snapshot before it serves, or the shards", error)
    raise AssertionError("the empty snapshot is always usable")
