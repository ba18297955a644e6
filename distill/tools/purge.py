"""Removes what no view of less than a given age could read: shards that others replace, snapshots, listings. No torch.

A view has an age because it began with a snapshot that was the newest one then. So all younger views have the newest
snapshot of that time, or a later one, and no shard that another had replaced in it.
"""

import argparse
import re
import time
from typing import NamedTuple

from distill.cache.format import CATALOG, TEMPORARY, shard_name, snapshot_name
from distill.cache.header import CacheHeader
from distill.cache.snapshot import Snapshot, snapshot_numbers, valid_snapshots
from distill.cache.store import Store
from distill.cache.tail import Ranges, replaced_by_tools, stream_seqs, writers_of

DEFAULT_AGE = "7d"
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_DAY = 86_400
"""Seconds after which a file of the catalog that nothing names is not being made any more."""


class Purge(NamedTuple):
    """Shards that were removed."""

    shards: int
    bytes: int


def age(text: str) -> float:
    """Seconds of an argument like 7d, 12h, 30m or 0s."""
    match = re.fullmatch(r"(\d{1,9})([smhd]?)", text)
    if match is None or not (match[2] or int(match[1]) == 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not an age like {DEFAULT_AGE}, 12h, 30m or 0s")
    return float(int(match[1]) * _SECONDS.get(match[2], 1))


def replaced_shards(store: Store, header: CacheHeader, until: Snapshot | None = None) -> list[str]:
    """Files of shards that are there and that others replace; until: as of this snapshot, None: now."""
    limits = None if until is None else {name: state.count for name, state in until.streams.items()}
    gone = Ranges(replaced_by_tools(store, header, {}, limits=limits))
    return [
        shard_name(writer, seq)
        for writer in writers_of(store)
        if gone.end(writer)
        for seq in stream_seqs(store, writer)
        if (writer, seq) in gone
    ]


def purge(store: Store, header: CacheHeader, seconds: float) -> Purge:
    """Removes what no view younger than `seconds` could read; the caller is `alone`.

    Raises:
        CacheError: a shard of a tool is damaged, or a file cannot be removed.
    """
    *snapshots, _ = valid_snapshots(store, header.identity)
    young = sum(each.made > time.time() - seconds for each in snapshots)
    used = {ref.name for snapshot in snapshots[: young + 1] for ref in snapshot.listings}
    if young == len(snapshots):
        _remove_unnamed(store, used)
        return Purge(0, 0)
    newest, *old = snapshots[young:]
    # In this order, so that a purge that was stopped finds again what is left.
    for name in {ref.name for snapshot in old for ref in snapshot.listings} - used:
        store.remove(name)
    for number in snapshot_numbers(store):
        if number < newest.number:
            store.remove(snapshot_name(number))
    _remove_unnamed(store, used)
    files = replaced_shards(store, header, newest)
    sizes = store.map(store.size, files)
    store.map(store.remove, files)
    return Purge(len(files), sum(sizes))


def _remove_unnamed(store: Store, used: set[str]) -> None:
    """Removes listings that no snapshot names and temporary files, both of processes that were killed a day ago."""
    for each in store.names(CATALOG):
        name = f"{CATALOG}/{each}"
        if (each.endswith((".listing", TEMPORARY))) and name not in used and store.modified(name) < time.time() - _DAY:
            store.remove(name)
