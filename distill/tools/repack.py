"""Records of many shards into few, as bytes; who made them, and of how many tokens, stays exact."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from distill.cache.entries import ENTRY, Names
from distill.cache.header import CacheHeader
from distill.cache.listing import Listing
from distill.cache.loss_curve import LossSums
from distill.cache.origins import Origin
from distill.cache.publish import publish_shard, remove_leftovers
from distill.cache.shard import Array, Columns, Shard, read_front
from distill.cache.shard_header import MAX_ORIGINS, MAX_SAMPLES, WIDTH, Replaced, ShardHeader
from distill.cache.snapshot import newest_snapshot
from distill.cache.store import Store
from distill.cache.tail import Ranges, next_seq
from distill.cache.view import View
from distill.config.errors import CacheError
from distill.tools.token_counter import TokenCounter

_SLACK = 1 << 15
"""Bytes for headers, footers and a snapshot, and for whole blocks of a disk."""


class Portion(NamedTuple):
    """What comes from one shard, and goes into one shard: records, and what they do there."""

    columns: Columns
    records: list[bytes]
    origins: tuple[Origin, ...] = ()
    losses: LossSums = LossSums()
    replaces: tuple[Replaced, ...] = ()
    """Shards that do not count any more since this is there."""

    @property
    def size(self) -> int:
        """Bytes of the records."""
        return sum(map(len, self.records))

    def replacing(self, header: ShardHeader) -> Portion:
        """In place of the shard that it comes from, which then does not count any more."""
        here = Replaced(header.writer, header.seq, header.seq)
        return self._replace(losses=header.losses, replaces=(here, *header.replaces))


_NONE = np.empty(0, np.int64)
NOTHING = Portion(Columns(_NONE, np.empty(0, np.uint64), _NONE, _NONE, _NONE), [])
"""No records, which may replace a shard all the same."""


def portion(shard: Shard, records: Sequence[bytes | None], keep: Array, counter: TokenCounter) -> Portion:
    """The samples at the places `keep` of a shard.

    records: of all its samples; None where one is damaged and not kept. Raises CacheError: one is not a record.
    """
    columns, origins = shard.columns, shard.header.origins
    kept: list[bytes] = [data for i in keep.tolist() if (data := records[i]) is not None]
    assert len(kept) == len(keep), "a damaged record is kept"
    if len(keep) == len(records):
        return Portion(columns, kept, origins)
    is_kept = np.zeros(len(records), np.bool_)
    is_kept[keep] = True

    tokens = {
        number: _tokens(shard, records, columns.origins == number, is_kept, origins[number], counter)
        for number in np.unique(columns.origins[keep]).tolist()
    }
    return part_of(columns.take(keep), kept, origins, tokens)


def part_of(
    columns: Columns, records: list[bytes], origins: Sequence[Origin], tokens: Mapping[int, int] | Sequence[int]
) -> Portion:
    """Some samples of a shard; tokens: how many the samples of an origin have, by the origin's number."""
    used, numbers = np.unique(columns.origins, return_inverse=True)
    left = []
    for number in used.tolist():
        steps = columns.steps[columns.origins == number]
        first, last = int(steps.min()), int(steps.max())
        origin = dataclasses.replace(origins[number], samples=len(steps), first_step=first, last_step=last)
        left.append(dataclasses.replace(origin, tokens=tokens[number]))
    return Portion(columns._replace(origins=numbers.reshape(-1)), records, tuple(left))


def _tokens(
    shard: Shard, records: Sequence[bytes | None], is_here: Array, is_kept: Array, origin: Origin,
    counter: TokenCounter,
) -> int:  # fmt: skip
    """Tokens of an origin's kept samples: from the records that are fewer, the kept ones or those left out."""

    def tokens(places: list[int]) -> int:
        some = [data for i in places if (data := records[i]) is not None]
        counts = [count for count in counter(some, shard.columns.atoms[places].tolist()) if count is not None]
        if len(counts) < len(places):
            raise CacheError(f"{shard.path}: a record verifies and cannot be decoded")
        return sum(counts)

    inside, outside = np.flatnonzero(is_here & is_kept).tolist(), np.flatnonzero(is_here & ~is_kept).tolist()
    is_known = len(inside) + len(outside) == origin.samples and all(records[i] is not None for i in outside)
    if is_known and len(outside) < len(inside):
        return origin.tokens - tokens(outside)
    return tokens(inside)


class Packer:
    """Collects portions and publishes a shard whenever it holds `limit` bytes of records.

    kind: the tool's name, which is its stream's; the caller holds `alone`.
    """

    def __init__(self, store: Store, header: CacheHeader, kind: str, limit: int):
        """Raises CacheError: damage in the tool's stream."""
        self._store, self._identity, self._kind = store, header.identity, kind
        self._most, self._sums = np.array([limit, MAX_SAMPLES, MAX_ORIGINS]), np.zeros(3, np.int64)
        self._state = next_seq(store, header, kind, newest_snapshot(store, header.identity).streams)
        remove_leftovers(store, kind, self._state.count)
        self._waiting: list[Portion] = []
        self.shards: list[ShardHeader] = []
        """What it has published."""

    def add(self, part: Portion) -> None:
        """Publishes first what waits, if the portion would not fit; CacheError if that fails."""
        more = np.array([part.size, len(part.records), len(part.origins)])
        if self._waiting and (self._sums + more > self._most).any():
            self.flush()
        self._waiting.append(part)
        self._sums += more

    def flush(self) -> None:
        """Publishes what waits."""
        parts, self._waiting = self._waiting, []
        self._sums[:] = 0
        if not any(each.records or each.replaces or each.losses.json() for each in parts):
            return
        first = np.cumsum([0] + [len(each.origins) for each in parts])
        columns = Columns(*(np.concatenate(column) for column in zip(*(each.columns for each in parts), strict=True)))
        shift = np.repeat(first[:-1], [len(each.records) for each in parts])
        records = [data for each in parts for data in each.records]
        ends = np.cumsum([len(data) for data in records], dtype=np.int64)
        origins = tuple(origin for each in parts for origin in each.origins)
        losses = LossSums.total(each.losses for each in parts)
        replaces = Ranges(each for part in parts for each in part.replaces).joined()
        joined = np.frombuffer(bytearray().join(records), np.uint8)
        del records, parts
        columns = columns._replace(origins=columns.origins + shift)
        header = publish_shard(
            self._store, self._identity, self._kind, self._state.count, self._kind, columns, joined, ends, origins,
            losses, replaces,
        )  # fmt: skip
        self._state = self._state.after(header)
        self.shards.append(header)


class Shards(NamedTuple):
    """The n shards of a view, in the order in which a student comes to them: by the teacher's steps."""

    names: Names
    rows: Array
    """ORIGIN [n]: the first origin row of each, with bytes, samples and where its records begin."""
    kept: Array
    """[n]: records that are wanted."""
    sizes: Array
    """[n]: their bytes."""

    @property
    def records(self) -> Array:
        """[n]: bytes of all records."""
        return self.rows["bytes"].astype(np.int64) - self.rows["records_at"]

    def place(self, number: int) -> tuple[str, int]:
        """Writer and number in the stream."""
        return self.names.shard(self.rows[number])

    def take(self, places: Array) -> Shards:
        """The shards at these places."""
        return Shards(self.names, self.rows[places], self.kept[places], self.sizes[places])

    def room(self, view: View) -> int:
        """About the bytes of new shards with all wanted records, and of the listings with them; view: of the cache
        where they go."""
        if not self.kept.any():
            return 0
        shards, samples = int(np.count_nonzero(self.kept)), int(self.kept.sum())
        listings = sum(ref.bytes for ref in view.snapshot.listings) + 2 * ENTRY.itemsize * samples
        return _SLACK + int(self.sizes.sum()) + WIDTH * samples + 512 * shards + listings


def shards_of(view: View, is_wanted: Callable[[Array, Array], Array]) -> Shards:
    """The shards of a view; ListingDamaged when a block of a listing does not verify.

    is_wanted: for sample ids and the steps of their records that count, whether each is wanted.
    """
    names, rows = view.origins()
    # Where the origin rows of each table begin among all.
    sizes = [part.origins if isinstance(part, Listing) else len(part.origins) for part in view.parts]
    firsts = np.cumsum([0, *sizes])
    kept, bytes_kept = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    for ids in view.chunks():
        found = view.find(ids)
        found = found.take(np.flatnonzero(is_wanted(ids, found.steps)))
        numbers = firsts[found.tables] + found.entries["origin"]
        np.add.at(kept, numbers, 1)
        np.add.at(bytes_kept, numbers, found.entries["size"].astype(np.int64))
    starts = np.flatnonzero(rows["number"] == 0)
    if not len(starts):
        return Shards(names, rows, kept, bytes_kept)
    steps = np.minimum.reduceat(rows["first_step"], starts)
    writers = np.argsort(np.argsort(np.array(names.writers, object)))[rows["writer"][starts]]
    order = np.lexsort((rows["seq"][starts], writers, steps))
    return Shards(names, rows[starts], np.add.reduceat(kept, starts), np.add.reduceat(bytes_kept, starts)).take(order)


class Copy(NamedTuple):
    """The wanted records of one shard, and the shard's header."""

    part: Portion
    header: ShardHeader


def copies(view: View, shards: Shards, is_wanted: Callable[[Array, Array], Array]) -> Iterator[Copy]:
    """For each shard, of `shards_of` with the same `is_wanted`, the records that it has of those that are wanted.

    Raises:
        CacheError: damage.
    """
    counter = TokenCounter(view.store, view.header)
    for number, kept in enumerate(shards.kept.tolist()):
        place = shards.place(number)
        if not kept:
            yield Copy(NOTHING, read_front(view.store, view.header, *place).header)
            continue
        shard = Shard(view.store, view.header, *place)
        ids = shard.columns.sample_ids
        keep = np.arange(len(ids))
        if kept < len(ids):
            keep = view.of_shard(view.find(ids), shard)
            keep = keep[is_wanted(ids[keep], shard.columns.steps[keep])]
        yield Copy(portion(shard, shard.span(0, len(ids)), keep, counter), shard.header)
