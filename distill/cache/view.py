"""A view of a cache: a snapshot's listings and the shards after it, in which records are looked up. No torch.

A view never changes; a reader that refreshes takes another one. It holds no open file, lock or thread, so that any
number of threads and forked processes may use it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from distill.cache.ahead import NEAR
from distill.cache.entries import ENTRY, ORIGIN, Array, EntryTable, Names, precedence
from distill.cache.format import TOOLS, WRITER, shard_name, snapshot_name
from distill.cache.header import CacheHeader
from distill.cache.listing import Listing, ListingDamaged, Totals, block_cache
from distill.cache.loss_curve import LossSums
from distill.cache.origins import Origin, summed
from distill.cache.shard import Shard, verified
from distill.cache.shard_header import ShardHeader
from distill.cache.snapshot import Snapshot, StreamState, load_snapshot, snapshot_numbers, valid_snapshots
from distill.cache.store import Store, is_missing
from distill.cache.tail import Tail, read_tail, writers_of
from distill.config.errors import CacheError

T = TypeVar("T")

log = logging.getLogger(__name__)

_TABLES = 8
"""Tables of new shards that are kept side by side before they become one."""

_LONG = 256
"""Shards after the snapshot with which a newer one is looked for."""


class Records(NamedTuple):
    """The records that count of n samples, where there is one."""

    entries: Array
    """ENTRY [n]."""
    tables: NDArray[np.int64]
    """[n]: number of the table that has the entry, -1 where there is no record."""
    rows: Array
    """ORIGIN [n]: the origin row of each."""

    @property
    def there(self) -> NDArray[np.bool_]:
        there: NDArray[np.bool_] = self.tables >= 0
        return there

    @property
    def steps(self) -> NDArray[np.int64]:
        """The teacher's step, -1 where there is no record."""
        return np.where(self.there, self.entries["step"].astype(np.int64), -1)

    def take(self, places: Array) -> Records:
        """The records at these places."""
        return Records(self.entries[places], self.tables[places], self.rows[places])


@dataclass(frozen=True)
class View:
    """Listings of a snapshot and tables of what came after it."""

    store: Store
    header: CacheHeader
    snapshot: Snapshot
    listings: tuple[Listing, ...]
    tables: tuple[EntryTable, ...]
    """Of shards after the snapshot."""
    tail: tuple[ShardHeader, ...]
    """Headers of these shards."""
    streams: dict[str, StreamState]
    block: Callable[[str, int, int, int], bytes]
    past: int = -1
    """Number of the newest snapshot that has been tried: its own, or one whose listing is damaged."""

    @property
    def pin(self) -> dict[str, Any]:
        """What `open_view` needs to make the same view again, as JSON."""
        return {"snapshot": self.snapshot.number, "streams": {name: s.count for name, s in self.streams.items()}}

    @property
    def parts(self) -> list[Listing | EntryTable]:
        return [*self.listings, *self.tables]

    # ------------------------------------------------------------ looking up

    def find(self, sample_ids: Array) -> Records:
        """The records that count; ListingDamaged when a block of a listing does not verify."""
        count = len(sample_ids)
        entries, rows = np.zeros(count, ENTRY), np.zeros(count, ORIGIN)
        tables = np.full(count, -1, np.int64)
        for number, part in enumerate(self.parts):
            found = part.find(sample_ids)
            new = np.flatnonzero(found.there)
            if not len(new):
                continue
            theirs = found.entries[new]
            their_rows = part.origin_rows(theirs["origin"].astype(np.int64))
            if number:
                mine = entries[new]
                is_new = tables[new] < 0
                is_tie = ~is_new & (theirs["step"] == mine["step"])
                wins = is_new | (theirs["step"] > mine["step"]) | (is_tie & (theirs["check"] > mine["check"]))
                for i in np.flatnonzero(is_tie & (theirs["check"] == mine["check"])).tolist():
                    others = self.names(tables[new[i]]).shard(rows[new[i]])
                    wins[i] = precedence(*part.names.shard(their_rows[i])) > precedence(*others)
                new, theirs, their_rows = new[wins], theirs[wins], their_rows[wins]
            entries[new], rows[new], tables[new] = theirs, their_rows, number
        return Records(entries, tables, rows)

    def names(self, table: int) -> Names:
        return self.parts[table].names

    def of_shard(self, records: Records, shard: Shard) -> NDArray[np.int64]:
        """Places in a shard of the records that count, of `records` of all samples of the shard."""
        is_here = records.there & (records.entries["start"] == shard.bounds[:-1])
        is_here &= records.rows["seq"] == shard.header.seq
        for table in np.unique(records.tables[is_here]).tolist():
            writers = self.names(table).writers
            mine = writers.index(shard.header.writer) if shard.header.writer in writers else -1
            is_here &= (records.tables != table) | (records.rows["writer"] == mine)
        return np.flatnonzero(is_here)

    def file(self, table: int, row: Any) -> str:
        """Name of the shard of an origin row."""
        return shard_name(*self.names(table).shard(row))

    def read(self, records: Records) -> list[bytes | None]:
        """The bytes of records, verified; None where there is none. Neighbors are read at once.

        Raises:
            CacheError: names file and sample of a record that is not what was written.
        """
        there = np.flatnonzero(records.there)
        if not len(there):
            return [None] * len(records.entries)
        files = [self.file(int(records.tables[i]), records.rows[i]) for i in there.tolist()]
        starts = records.rows["records_at"][there].astype(np.int64) + records.entries["start"][there]
        sizes = records.entries["size"][there].astype(np.int64)
        order = sorted(range(len(there)), key=lambda i: (files[i], int(starts[i])))
        spans = list(_spans(order, files, starts, sizes, NEAR if self.store.slow else 0))
        blobs = self.store.map(lambda span: self._read_span(span.file, span.start, span.size), spans)
        data: list[bytes | None] = [None] * len(records.entries)
        for span, blob in zip(spans, blobs, strict=True):
            for i in span.items:
                first, entry = int(starts[i]) - span.start, records.entries[there[i]]
                record, path = blob[first : first + int(sizes[i])], self.store.path(files[i])
                sample, token_digest, expected = (int(entry[name]) for name in ("sample", "digest", "check"))
                data[there[i]] = verified(path, sample, token_digest, expected, record)
        return data

    def _read_span(self, file: str, start: int, size: int) -> bytes:
        try:
            return self.store.read_ahead(file, start, size)
        except CacheError as error:
            if is_missing(error):
                raise CacheError(
                    f"{error}; if `compact --purge` has removed it, refresh the reader: a view from before the "
                    "compaction cannot be read any more"
                ) from error.__cause__
            raise

    # ------------------------------------------------------------ as a whole

    def check(self) -> None:
        """Reads the listings through; ListingDamaged when a block does not verify."""
        for listing in self.listings:
            listing.check()

    @property
    def losses(self) -> LossSums:
        """The teacher's label loss by step, over all that was ever published."""
        return LossSums.total([each.losses for each in self.listings] + [each.losses for each in self.tail])

    @property
    def totals(self) -> Totals:
        """Sums over all shards."""
        parts = [Totals(0, 0, 0, 0, 0), *(each.totals for each in self.listings)]
        parts += [Totals(1, each.samples, each.tokens, each.atoms, each.bytes) for each in self.tail if each.samples]
        return Totals(*(sum(column) for column in zip(*map(astuple, parts), strict=True)))

    @property
    def summary(self) -> list[Origin]:
        """Origins of all shards, summed by teacher."""
        return summed(
            [origin for listing in self.listings for origin in listing.summary]
            + [origin for header in self.tail for origin in header.origins]
        )

    def origins(self) -> tuple[Names, Array]:
        """What origin rows name by number, and ORIGIN [n] of all shards, table after table."""
        names, parts = Names([], []), [np.empty(0, ORIGIN)]
        parts += [part.names.into(names, rows) for part in self.parts for rows in part.origin_chunks()]
        return names, np.concatenate(parts)

    def chunks(self, size: int = 1 << 16) -> Iterator[Array]:
        """Ids of the samples that have a record, ascending, about `size` at a time."""
        if len(self.parts) == 1:
            for entries in self.parts[0].chunks(size):
                yield entries["sample"]
            return
        for first in range(0, self.header.samples, size):
            ids = np.arange(first, min(first + size, self.header.samples))
            there = np.zeros(len(ids), np.bool_)
            for part in self.parts:
                there |= part.find(ids).there
            yield ids[there]

    @property
    def covered(self) -> int:
        """Samples that have a record."""
        if len(self.parts) == 1:
            part = self.parts[0]
            return part.entries if isinstance(part, Listing) else len(part.entries)
        return sum(map(len, self.chunks())) if self.parts else 0


class _Span(NamedTuple):
    """Records of one file that are read at once."""

    file: str
    """Name of the shard's file in the store."""
    start: int
    size: int
    items: list[int]


def _spans(order: Sequence[int], files: Sequence[str], starts: Array, sizes: Array, gap: int) -> Iterator[_Span]:
    """Records, in the order of files and places, in as few reads as leave out at most `gap` bytes."""
    items: list[int] = []
    end = 0
    for i in order:
        if items and (files[i] != files[items[0]] or int(starts[i]) > end + gap):
            yield _span(items, files, starts, end)
            items = []
        end = max(end if items else 0, int(starts[i] + sizes[i]))
        items.append(i)
    if items:
        yield _span(items, files, starts, end)


def _span(items: list[int], files: Sequence[str], starts: Array, end: int) -> _Span:
    first = int(starts[items[0]])
    return _Span(files[items[0]], first, end - first, items)


# ---------------------------------------------------------------- opening and refreshing


def open_view(store: Store, header: CacheHeader, pin: Mapping[str, Any] | None = None, bad: int | None = None) -> View:
    """The newest view, or the one that `pin` (of `View.pin`) names.

    A snapshot that is damaged, or gone, is named in a warning; the one before it serves, or the shards. bad: use
    snapshots below this number alone.

    Raises:
        CacheError: damage, or shards of the pinned view that are not there any more.
    """
    limits = None if pin is None else _limits(store, pin)
    block, past = block_cache(store), -1
    for snapshot in _candidates(store, header, pin, bad):
        past = max(past, snapshot.number)
        try:
            opened = partial(Listing, store, cache=header.identity, block=block)
            listings = tuple(store.map(opened, snapshot.listings))
        except CacheError as error:
            log.warning("%s; the snapshot before it serves, or the shards", error)
            continue
        view = View(store, header, snapshot, listings, (), (), dict(snapshot.streams), block, past)
        writers = _followed(store, snapshot) if limits is None else limits
        return _with_tail(view, read_tail(store, header, snapshot.streams, writers, limits=limits))
    raise AssertionError("the empty snapshot is always a candidate")


def _limits(store: Store, pin: Mapping[str, Any]) -> dict[str, int]:
    """The count of each writer's shards; CacheError: the pin is not one that `View.pin` gives."""

    def is_number(value: Any, least: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value < 10**18

    streams = pin.get("streams") if isinstance(pin, Mapping) else None
    if (
        not isinstance(streams, Mapping)
        or pin.keys() != {"snapshot", "streams"}
        or not is_number(pin["snapshot"], -1)
        or not all(
            isinstance(name, str) and WRITER.fullmatch(name) and is_number(count, 0) for name, count in streams.items()
        )
    ):
        raise CacheError(
            f"cache {store.root}: the view is {pin!r:.200}; expected is what a reader's `view` gives, "
            "{'snapshot': NUMBER, 'streams': {WRITER: COUNT}}"
        )
    return dict(streams)


def snapshot_view(store: Store, header: CacheHeader, snapshot: Snapshot) -> View:
    """A snapshot without what was published after it; CacheError as `open_view`."""
    streams = {name: state.count for name, state in snapshot.streams.items()}
    return open_view(store, header, {"snapshot": snapshot.number, "streams": streams})


def asked(view: View, question: Callable[[View], T]) -> tuple[View, T]:
    """The view, and an answer from it; where a listing is damaged, another view of the same shards, without the
    snapshot."""
    try:
        return view, question(view)
    except ListingDamaged as error:
        log.warning("%s; the shards serve: codistill-cache index makes a new listing", error)
        fresh = replace(open_view(view.store, view.header, view.pin, bad=view.snapshot.number), past=view.past)
        return fresh, question(fresh)


def sound_view(view: View) -> View:
    """The view, whose listings have been read through, or what `asked` takes in its place."""
    return asked(view, View.check)[0]


def refreshed(view: View) -> View:
    """The view with what has been published since; the same one when that is nothing. CacheError as `open_view`."""
    store, header = view.store, view.header
    if _has_newer(view) and (fresh := open_view(store, header)).snapshot.number > view.past:
        return fresh
    try:
        tail = read_tail(store, header, view.streams, _followed(store, view.snapshot), is_refresh=True)
    except CacheError:
        # A purge may have removed shards that a much newer snapshot does not need.
        if (fresh := open_view(store, header)).snapshot.number > view.past:
            return fresh
        raise
    if tail.replaced:  # by shards of a tool, which a view without a snapshot follows
        return open_view(store, header)
    return view if tail.states == view.streams else _with_tail(view, tail)


def _has_newer(view: View) -> bool:
    """Whether there may be a snapshot after the view's. A purge of the next one takes the view's own, too."""
    store, past = view.store, view.past
    if past >= 0 and len(view.tail) < _LONG:
        return store.exists(snapshot_name(past + 1)) or not store.exists(snapshot_name(past))
    return max(snapshot_numbers(store), default=-1) > past


def _candidates(
    store: Store, header: CacheHeader, pin: Mapping[str, Any] | None, bad: int | None
) -> Iterator[Snapshot]:
    cache = header.identity
    if pin is None:
        yield from valid_snapshots(store, cache, bad)
        return
    if 0 <= pin["snapshot"] != bad:
        try:
            pinned = load_snapshot(store, cache, pin["snapshot"])
        except CacheError as error:
            log.warning("%s; the shards serve", error)
            pinned = None
        # Where a catalog was lost and made again, its numbers are those of other snapshots.
        if pinned and all(state.count <= pin["streams"].get(name, 0) for name, state in pinned.streams.items()):
            yield pinned
    yield Snapshot(cache)


def _followed(store: Store, snapshot: Snapshot) -> list[str]:
    """Writers whose streams a view follows. What tools write counts with the snapshot that they make at their end, if
    there are snapshots at all."""
    return [name for name in writers_of(store) if snapshot.number < 0 or name not in TOOLS]


def _with_tail(view: View, tail: Tail) -> View:
    if not tail.shards:
        return replace(view, streams=tail.states)
    tables = [*view.tables, EntryTable.of_shards(tail.shards)]
    if len(tables) > _TABLES:
        tables = [EntryTable.joined(tables)]
    headers = (*view.tail, *(shard.header for shard in tail.shards))
    return replace(view, tables=tuple(tables), tail=headers, streams=tail.states)
