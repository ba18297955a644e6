"""Makes a listing of tables of samples, in memory or on disk: of each sample the record that counts. No torch."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import xxhash

from distill.cache.entries import ENTRY, ORIGIN, Array, EntryTable, Names, newest, ranks, replaced_rows
from distill.cache.format import listing_name
from distill.cache.listing import ENTRIES, FENCE, FENCES, ORIGINS, Listing, ListingRef, Totals
from distill.cache.loss_curve import LossSums
from distill.cache.origins import Origin, summed
from distill.cache.seal import digest, seal
from distill.cache.shard_header import Replaced
from distill.cache.store import Store

_TOGETHER = 1 << 20
"""Entries that a merge has in memory at one time."""


def write_listing(
    store: Store, cache: str, sources: Sequence[Listing | EntryTable], losses: LossSums, drop: Sequence[Replaced] = ()
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

    def __init__(self, cache: str, sources: Sequence[Listing | EntryTable], losses: LossSums, drop: Sequence[Replaced]):
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
