"""Listings: sealed, immutable tables of samples on disk, sorted by id, in blocks with digests. No torch.

    entries in blocks | fences in blocks | origin rows in blocks | footer

A fence is the first id and the digest of a block of entries. The footer, sealed JSON, has the first id and digest of
each block of fences and the digest of each block of origin rows. A snapshot names the footer's digest, so every byte is
covered. Blocks are read when they are needed; never mapped, never loaded whole.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Protocol, TypeVar

import numpy as np
import xxhash

from distill.cache.entries import (
    ENTRY,
    ORIGIN,
    Array,
    EntryTable,
    Found,
    Names,
    find_in,
    newest,
    ranks,
    replaced_rows,
)
from distill.cache.fields import checked
from distill.cache.format import listing_name
from distill.cache.loss_curve import LossSums
from distill.cache.origins import Origin, summed
from distill.cache.seal import digest, seal, unseal
from distill.cache.shard_header import Replaced
from distill.cache.store import Store
from distill.config.errors import CacheError

T = TypeVar("T")

FENCE = np.dtype([("first", "<i8"), ("digest", "<u8")])
ENTRIES, FENCES, ORIGINS = 256, 1024, 256
"""Rows of a block."""
KEPT = 1024
"""Blocks that a reader keeps in memory, of 11 to 22 kB each."""
_AT_ONCE = 64
"""Blocks that are read at one time."""
_TOGETHER = 1 << 20
"""Entries that a merge has in memory at one time."""


class ListingDamaged(CacheError):
    """A listing that cannot be used; what it lists is in the shards."""


@dataclass(frozen=True)
class ListingRef:
    """What a snapshot says of a listing."""

    name: str
    """Of the file."""
    footer_at: int
    bytes: int
    """Of the whole file."""
    digest: str
    """Of the footer."""
    entries: int
    """Samples listed."""


@dataclass(frozen=True)
class Totals:
    """Sums over the shards of a listing."""

    shards: int
    samples: int
    """Records in them, those too that others supersede."""
    tokens: int
    atoms: int
    bytes: int


class Source(Protocol):
    """A table of samples that a listing is made of."""

    @property
    def names(self) -> Names:
        """What its origin rows name."""

    def chunks(self, size: int) -> Iterator[Array]:
        """Entries in order, about `size` at a time."""

    def origin_chunks(self) -> Iterator[Array]:
        """Origin rows in order."""


@dataclass
class TableSource:
    """A table in memory as the source of a listing."""

    table: EntryTable

    @property
    def names(self) -> Names:
        return self.table.names

    def chunks(self, size: int) -> Iterator[Array]:
        for start in range(0, len(self.table.entries), size):
            yield self.table.entries[start : start + size]

    def origin_chunks(self) -> Iterator[Array]:
        yield self.table.origins


# ---------------------------------------------------------------- reading


def block_cache(store: Store) -> Callable[[str, int, int, int], bytes]:
    """A function that reads and verifies blocks (file, start, bytes, digest), and keeps the last ones."""

    @lru_cache(KEPT)
    def block(name: str, start: int, size: int, expected: int) -> bytes:
        try:
            data = store.read_at(name, start, size)
        except CacheError as error:
            raise ListingDamaged(str(error)) from error.__cause__
        if xxhash.xxh3_64_intdigest(data) != expected:
            raise ListingDamaged(
                f"{store.path(name)} is damaged: bytes {start} to {start + size} do not verify; "
                f"codistill-cache index {store.root} --rebuild makes a new one"
            )
        return data

    return block


class Listing:
    """A listing, open for reading; any number of threads and processes may share it."""

    def __init__(self, store: Store, ref: ListingRef, cache: str, block: Callable[[str, int, int, int], bytes]):
        """Raises ListingDamaged where the footer is not the one that the snapshot names.

        cache: digest of the cache's header. block: as `block_cache` makes it.
        """
        self.ref, self._store, self._block = ref, store, block
        where = store.path(ref.name)
        try:
            data = store.read_at(ref.name, ref.footer_at, ref.bytes - ref.footer_at)
            if digest(data) != ref.digest:
                raise ValueError(f"its footer has digest {digest(data)}, {ref.digest} in the snapshot")
            footer = unseal(data)
            if footer["cache"] != cache:
                raise ValueError(f"it belongs to another cache, {footer['cache']!s:.80}")
            self.names = Names(footer["writers"], footer["teachers"])
            self.entries, self.origins = int(footer["entries"]), int(footer["origins"])
            self.losses = LossSums.of(footer["losses"])
            self.totals = checked(Totals, footer["totals"])
            self.summary = [checked(Origin, each) for each in footer["summary"]]
            self._roots = np.array([first for first, _ in footer["fences"]], np.int64)
            self._fence_digests = [int(each, 16) for _, each in footer["fences"]]
            self._origin_digests = [int(each, 16) for each in footer["origin_blocks"]]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ListingDamaged(f"{where} is damaged: {error!s:.300}") from error
        blocks = -(-self.entries // ENTRIES)
        self._fences_at = self.entries * ENTRY.itemsize
        self._origins_at = self._fences_at + blocks * FENCE.itemsize
        self._blocks = blocks

    def _rows(self, dtype: Any, base: int, number: int, per_block: int, count: int, expected: int) -> Array:
        """The rows of a block."""
        rows = min(per_block, count - number * per_block)
        start = base + number * per_block * dtype.itemsize
        return np.frombuffer(self._block(self.ref.name, start, rows * dtype.itemsize, expected), dtype)

    def _fence_block(self, number: int) -> Array:
        return self._rows(FENCE, self._fences_at, number, FENCES, self._blocks, self._fence_digests[number])

    def _entry_block(self, number: int, fence: Any) -> Array:
        return self._rows(ENTRY, 0, number, ENTRIES, self.entries, int(fence["digest"]))

    def find(self, sample_ids: Array) -> Found:
        """Entries of samples; ListingDamaged when a block does not verify."""
        found = Found(np.zeros(len(sample_ids), ENTRY), np.zeros(len(sample_ids), np.bool_))
        tops = np.searchsorted(self._roots, sample_ids, side="right") - 1
        wanted: list[tuple[int, Any, Array]] = []
        for top, fences in self._each(self._fence_block, sorted({*tops.tolist()} - {-1})):
            here = np.flatnonzero(tops == top)
            blocks = np.searchsorted(fences["first"], sample_ids[here], side="right") - 1
            for number in sorted({*blocks.tolist()}):
                wanted.append((top * FENCES + number, fences[number], here[blocks == number]))
        for (_, _, some), entries in self._each(lambda each: self._entry_block(each[0], each[1]), wanted):
            found.entries[some], found.there[some] = find_in(entries, entries["sample"], sample_ids[some])
        return found

    def origin_rows(self, numbers: Array) -> Array:
        """Origin rows by number."""
        rows = np.empty(len(numbers), ORIGIN)
        blocks = numbers // ORIGINS
        for block, part in self._each(self._origin_block, sorted({*blocks.tolist()})):
            here = blocks == block
            rows[here] = part[numbers[here] - block * ORIGINS]
        return rows

    def _each(self, read: Callable[[T], Array], items: Sequence[T]) -> Iterator[tuple[T, Array]]:
        """Items with their blocks, some at a time, which a slow store reads at once."""
        for start in range(0, len(items), _AT_ONCE):
            part = items[start : start + _AT_ONCE]
            yield from zip(part, self._store.map(read, part), strict=True)

    def _origin_block(self, number: int) -> Array:
        return self._rows(ORIGIN, self._origins_at, number, ORIGINS, self.origins, self._origin_digests[number])

    # ------------------------------------------------------------ as a source

    def chunks(self, size: int) -> Iterator[Array]:
        """Entries in order, about `size` at a time."""
        parts: list[Array] = []
        for top in range(len(self._roots)):
            for number, fence in enumerate(self._fence_block(top)):
                parts.append(self._entry_block(top * FENCES + number, fence))
                if len(parts) * ENTRIES >= size:
                    yield np.concatenate(parts)
                    parts = []
        if parts:
            yield np.concatenate(parts)

    def origin_chunks(self) -> Iterator[Array]:
        """Origin rows in order, a block at a time."""
        for number in range(len(self._origin_digests)):
            yield self._origin_block(number)


# ---------------------------------------------------------------- writing


def write_listing(
    store: Store, cache: str, sources: Sequence[Source], losses: LossSums, drop: Sequence[Replaced] = ()
) -> ListingRef:
    """Makes one listing of several tables: of each sample the record that counts.

    cache: digest of the cache's header. losses: of all shards listed. drop: ranges of shards that are left out.
    """
    merged = _MergedListing(cache, sources, losses, drop)
    name = listing_name(secrets.token_hex(8))
    size = store.publish_parts(name, merged.parts())
    return ListingRef(name, size - len(merged.footer), size, digest(merged.footer), merged.count)


class _MergedListing:
    """The bytes of a listing, part by part."""

    def __init__(self, cache: str, sources: Sequence[Source], losses: LossSums, drop: Sequence[Replaced]):
        self._cache, self._sources, self._losses = cache, sources, losses
        self._names = Names([], [])
        self.count = 0
        self.footer = b""
        rows: list[Array] = []
        self._numbers: list[Array] = []
        """For each source the new number of each of its origin rows; -1: left out."""
        total = 0
        for source in sources:
            parts = list(source.origin_chunks())
            here = np.concatenate(parts) if parts else np.empty(0, ORIGIN)
            keep = ~replaced_rows(here, source.names, drop)
            numbers = np.where(keep, total + np.cumsum(keep) - 1, -1)
            rows.append(source.names.into(self._names, here[keep]))
            self._numbers.append(numbers)
            total += len(rows[-1])
        self._origins = np.concatenate(rows) if rows else np.empty(0, ORIGIN)
        self._ranks = ranks(self._origins, self._names)

    def parts(self) -> Iterator[bytes]:
        """All bytes, in order; `footer` and `count` are known after the last part."""
        fences: list[Array] = []
        rest = np.empty(0, ENTRY)
        for entries in self._merged():
            rest = np.concatenate([rest, entries])
            whole = len(rest) // ENTRIES * ENTRIES
            yield self._blocks(rest[:whole], fences)
            rest = rest[whole:]
        yield self._blocks(rest, fences)
        table = np.concatenate(fences) if fences else np.empty(0, FENCE)
        roots = []
        for start in range(0, len(table), FENCES):
            data = table[start : start + FENCES].tobytes()
            roots.append([int(table["first"][start]), digest(data)])
            yield data
        blocks = [self._origins[i : i + ORIGINS].tobytes() for i in range(0, len(self._origins), ORIGINS)]
        yield from blocks
        self.footer = self._footer(roots, [digest(data) for data in blocks])
        yield self.footer

    def _blocks(self, entries: Array, fences: list[Array]) -> bytes:
        """The bytes of whole blocks, whose fences are added."""
        self.count += len(entries)
        data = entries.tobytes()
        step = ENTRIES * ENTRY.itemsize
        fence = np.empty(-(-len(entries) // ENTRIES), FENCE)
        fence["first"] = entries["sample"][::ENTRIES]
        view = memoryview(data)
        fence["digest"] = [xxhash.xxh3_64_intdigest(view[i : i + step]) for i in range(0, len(data), step)]
        fences.append(fence)
        return data

    def _footer(self, roots: list[list[Any]], origin_blocks: list[str]) -> bytes:
        rows = self._origins
        firsts = rows[rows["number"] == 0]
        totals = Totals(
            len(firsts), int(firsts["shard_samples"].sum()), int(rows["tokens"].sum()), int(firsts["atoms"].sum()),
            int(firsts["bytes"].sum()),
        )  # fmt: skip
        return seal(
            {
                "cache": self._cache,
                "entries": self.count,
                "origins": len(rows),
                "writers": self._names.writers,
                "teachers": self._names.teachers,
                "totals": dataclasses.asdict(totals),
                "losses": self._losses.json(),
                "summary": [dataclasses.asdict(each) for each in self._summary()],
                "fences": roots,
                "origin_blocks": origin_blocks,
            }
        )

    def _summary(self) -> list[Origin]:
        """Origins by teacher, summed."""
        sums: list[Origin] = []
        for start in range(0, len(self._origins), _TOGETHER >> 6):
            part = self._origins[start : start + (_TOGETHER >> 6)]
            sums = summed([*sums, *map(self._names.origin, part)])
        return sums

    def _merged(self) -> Iterator[Array]:
        """Entries of all sources in order of ids, one of each sample."""
        size = max(ENTRIES, _TOGETHER // max(len(self._sources), 1))
        feeds = [
            map(partial(_renumbered, numbers), source.chunks(size))
            for source, numbers in zip(self._sources, self._numbers, strict=True)
        ]
        waiting = [np.empty(0, ENTRY)] * len(feeds)
        ends: list[int | None] = [-1] * len(feeds)
        """Up to which id each source has been read; None: to its end."""
        while True:
            for i, feed in enumerate(feeds):
                while ends[i] is not None and not len(waiting[i]):
                    chunk = next(feed, None)
                    ends[i] = None if chunk is None else chunk[1]
                    waiting[i] = waiting[i] if chunk is None else chunk[0]
            open_ends = [end for end in ends if end is not None]
            if not open_ends and not any(map(len, waiting)):
                return
            take = []
            for i, entries in enumerate(waiting):
                cut = np.searchsorted(entries["sample"], min(open_ends), side="right") if open_ends else len(entries)
                take.append(entries[:cut])
                waiting[i] = entries[cut:]
            yield newest(np.concatenate(take), self._ranks)


def _renumbered(numbers: Array, entries: Array) -> tuple[Array, int]:
    """Entries that are not left out, with their new origin rows; and the last id read."""
    last = int(entries["sample"][-1])
    origins = numbers[entries["origin"]]
    entries = entries[origins >= 0].copy()
    entries["origin"] = origins[origins >= 0]
    return entries, last


def merged_losses(parts: Iterable[LossSums], dropped: Iterable[LossSums]) -> LossSums:
    """Sums of a listing that is made of others, without those of shards that are left out."""
    sums = LossSums.total(parts)
    for each in dropped:
        sums.update(each, -1)
    return sums
