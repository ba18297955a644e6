"""Snapshots: numbered, sealed, immutable; each names the listings that count and how far they go. No torch.

Listings and snapshots are derived: all of them may be lost, and are made again from the shards.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from distill.cache.fields import checked
from distill.cache.format import CATALOG, FORMAT, snapshot_name, snapshot_of
from distill.cache.listing import ListingRef
from distill.cache.seal import seal, unseal
from distill.cache.shard_header import ShardHeader
from distill.cache.store import Store, is_missing
from distill.config.errors import CacheError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamState:
    """How far a writer's stream has been taken in."""

    count: int = 0
    """Shards and marks."""
    source: str = ""
    """Of the last one: capture, backfill, import, compact, merge or repair."""
    step: int = -1
    """Greatest step of its shards since the last begin mark, which sets it."""
    finished: bool = False
    """The last one is an end mark."""

    def past(self, seq: int) -> StreamState:
        """With shard number `seq`, which is not there any more."""
        return replace(self, count=seq + 1, finished=False)

    def after(self, header: ShardHeader) -> StreamState:
        """With the next shard or mark."""
        if header.kind == "gap":
            return self.past(header.seq)
        step = header.step if header.kind == "begin" else max(self.step, header.step)
        return StreamState(header.seq + 1, header.source, step, header.kind == "end")


@dataclass(frozen=True)
class Snapshot:
    """What counts at one moment: listings, and after them every shard from each stream's count on."""

    cache: str
    """Digest of the cache's header."""
    number: int = -1
    """-1: there is none, so the shards serve."""
    made: int = 0
    """Seconds since 1970."""
    streams: dict[str, StreamState] = field(default_factory=dict)
    """By writer."""
    listings: tuple[ListingRef, ...] = ()

    def dump(self) -> bytes:
        """The bytes of the file."""
        record = {"format": FORMAT} | {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        record["streams"] = {name: dataclasses.asdict(state) for name, state in sorted(self.streams.items())}
        record["listings"] = [dataclasses.asdict(each) for each in self.listings]
        return seal(record, indent=1)

    @classmethod
    def of(cls, data: bytes, cache: str, number: int) -> Snapshot:
        """Inverse of `dump`; ValueError where it is not that, or not this cache's."""
        try:
            record: dict[str, Any] = unseal(data)
            if record.pop("format") != FORMAT:
                raise ValueError("it has another format")
            parts = {
                "streams": {name: checked(StreamState, each) for name, each in record["streams"].items()},
                "listings": tuple(checked(ListingRef, each) for each in record["listings"]),
            }
            snapshot = checked(cls, record | parts)
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(str(error)) from error
        if (snapshot.cache, snapshot.number) != (cache, number):
            raise ValueError(f"it is snapshot {snapshot.number} of cache {snapshot.cache}")
        return snapshot


def snapshot_numbers(store: Store) -> list[int]:
    """Of all snapshots, newest first."""
    numbers = (snapshot_of(name) for name in store.names(CATALOG))
    return sorted((number for number in numbers if number is not None), reverse=True)


def load_snapshot(store: Store, cache: str, number: int) -> Snapshot | None:
    """The snapshot of this number; None: there is none. CacheError: it is damaged."""
    name = snapshot_name(number)
    try:
        return Snapshot.of(store.read(name), cache, number)
    except ValueError as error:
        raise CacheError(f"{store.path(name)} is damaged: {error!s:.300}") from error
    except CacheError as error:
        if is_missing(error):
            return None
        raise


def valid_snapshots(store: Store, cache: str, below: int | None = None) -> Iterator[Snapshot]:
    """Those of numbers less than `below`, newest first, and then the empty one; damaged ones are named in a warning."""
    for number in snapshot_numbers(store):
        if below is not None and number >= below:
            continue
        try:
            snapshot = load_snapshot(store, cache, number)
        except CacheError as error:
            log.warning("%s; an older one serves, or the shards: codistill-cache index makes a new one", error)
            continue
        if snapshot is not None:
            yield snapshot
    yield Snapshot(cache)


def newest_snapshot(store: Store, cache: str) -> Snapshot:
    """The newest valid one; the empty one where there is none."""
    return next(valid_snapshots(store, cache))


def publish_snapshot(store: Store, snapshot: Snapshot) -> bool:
    """Puts a snapshot in place, unless there is one with its number; False: there was."""
    snapshot = dataclasses.replace(snapshot, made=int(time.time()))
    return store.create(snapshot_name(snapshot.number), snapshot.dump())
