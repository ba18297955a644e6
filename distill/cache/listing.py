"""Listings: sealed, immutable tables of samples on disk, sorted by id, in blocks with digests. No torch.

    entries in blocks | fences in blocks | origin rows in blocks | footer

A fence is the first id and the digest of a block of entries. The footer, sealed JSON, has the first id and digest of
each block of fences and the digest of each block of origin rows. A snapshot names the footer's digest, so every byte is
covered. Blocks are read when they are needed; never mapped, never loaded whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import xxhash

from distill.cache.entries import ENTRY, ORIGIN, Array, Found, Names, find_in
from distill.cache.fields import checked
from distill.cache.loss_curve import LossSums
from distill.cache.origins import Origin
from distill.cache.seal import digest, unseal
from distill.cache.store import Store
from distill.config.errors import CacheError

T = TypeVar("T")

FENCE = np.dtype([("first", "<i8"), ("digest", "<u8")])
ENTRIES, FENCES, ORIGINS = 256, 1024, 256
"""Rows of a block."""
KEPT = 1024
"""Blocks that a reader keeps in memory, of 11 to 22 kB each."""
PIECE = 1 << 20
"""Samples that are put into a listing, or read from it, at one time; 44 bytes each."""
_AT_ONCE = 64
"""Blocks that are read at one time."""


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

    def check(self) -> None:
        """Reads all blocks; ListingDamaged when one does not verify."""
        for rows in (self.chunks(PIECE), self.origin_chunks()):
            for _ in rows:
                pass

    def origin_chunks(self) -> Iterator[Array]:
        """Origin rows in order, a block at a time."""
        for number in range(len(self._origin_digests)):
            yield self._origin_block(number)
