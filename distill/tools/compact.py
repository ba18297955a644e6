"""Many shards into few: the newest record of each sample, copied as bytes, in the order of the teacher's steps.

That order, not that of ids, is the one in which students come back to the records. Shards that are large enough and
hold nothing superseded stay as they are, so that the work goes with what has come since the last time. A new shard
replaces, at the moment that it is there, the shards whose records it has; a snapshot then has all of it. Whatever stops
the work, the next compaction goes on. Shards that appear meanwhile are not touched.
"""

import argparse
from typing import NamedTuple

import numpy as np

from distill.cache import cataloging
from distill.cache.header import CacheHeader
from distill.cache.open_store import open_store
from distill.cache.shard import Array
from distill.cache.store import Store
from distill.cache.view import snapshot_view
from distill.config.errors import ConfigError
from distill.config.paths import home
from distill.config.terminal import advancing
from distill.config.units import file_size, grouped
from distill.tools import common, format2
from distill.tools.merge import merge
from distill.tools.purge import DEFAULT_AGE, Purge, age, purge, replaced_shards
from distill.tools.repack import Packer, Shards, copies, shards_of


class Compaction(NamedTuple):
    """What was done."""

    before: int
    """Shards that count, before and after."""
    after: int
    copied: int
    """Records."""
    dropped: int
    """Records that later ones had superseded."""
    bytes_before: int
    """Of shards that count."""
    bytes_after: int
    purged: Purge
    """Replaced shards that were removed."""
    waiting: int
    """Replaced shards that are still there."""


def compact(store: Store, *, shard_bytes: int, purge_age: float | None = None) -> Compaction:
    """Compacts one cache in its place.

    shard_bytes: of records in a shard; memory is about three times as much. purge_age: seconds; remove the files that
    only older views could read.

    Raises:
        CacheError: damage, another tool at work, too little room on the disk, or a file that cannot be written.
    """
    header = CacheHeader.load(store)
    with common.alone(store):
        # What can be removed makes room for what is to be written.
        purged = _purge(store, header, purge_age)
        snapshot = cataloging.update(store, header)
        purged += _purge(store, header, purge_age)
        view = snapshot_view(store, header, snapshot)
        shards = shards_of(view, _is_there)
        chosen = shards.take(_choose(shards, shard_bytes))
        common.check_room(store, chosen.room(view), "the compaction")
        packer = Packer(store, header, "compact", shard_bytes)
        with advancing("compact", int(chosen.sizes.sum())) as advance:
            for copy in copies(view, chosen, _is_there):
                packer.add(copy.part.replacing(copy.header))
                advance(copy.part.size)
            packer.flush()
        cataloging.update(store, header, is_merging=True)
        purged += _purge(store, header, purge_age)
        waiting = len(replaced_shards(store, header))
    bytes_before = int(shards.rows["bytes"].sum())
    return Compaction(
        before=len(shards.rows),
        after=len(shards.rows) - len(chosen.rows) + sum(shard.samples > 0 for shard in packer.shards),
        copied=int(chosen.kept.sum()),
        dropped=int(chosen.rows["shard_samples"].sum() - chosen.kept.sum()),
        bytes_before=bytes_before,
        bytes_after=bytes_before - int(chosen.rows["bytes"].sum()) + sum(shard.bytes for shard in packer.shards),
        purged=Purge(*np.sum(purged, axis=0).tolist()) if purged else Purge(0, 0),
        waiting=waiting,
    )


def _is_there(ids: Array, steps: Array) -> Array:
    return steps >= 0


def _purge(store: Store, header: CacheHeader, purge_age: float | None) -> list[Purge]:
    return [] if purge_age is None else [purge(store, header, purge_age)]


def _choose(shards: Shards, shard_bytes: int) -> Array:
    """Which shards to replace."""
    is_partial = shards.kept < shards.rows["shard_samples"]
    chosen = np.flatnonzero(is_partial | (shards.records < shard_bytes / 2))
    if len(chosen) == 1 and not is_partial[chosen].any():
        return chosen[:0]  # the rest of an earlier compaction, alone
    return chosen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_folder(parser)
    common.add_shard_mb(parser)
    parser.add_argument(
        "--purge", metavar="AGE", nargs="?", const=age(DEFAULT_AGE), type=age,
        help="remove replaced shards and snapshots that only views older than AGE could read, like 12h or 0s "
        f"({DEFAULT_AGE}); such views cannot be read any more",
    )  # fmt: skip
    parser.add_argument(
        "--into", metavar="NEW", type=home,
        help="leave the cache, of format 2 or 3, as it is and write a compact one there",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    if args.into and args.purge is not None:
        raise ConfigError("--purge is no option of --into, which replaces nothing")
    size, stores = common.shard_bytes(args), common.caches(args.dir)
    for store in stores:
        if args.into:
            common.check_distinct(store.root, args.into)
            below = "" if len(stores) == 1 else "/" + store.root.rsplit("/", 1)[-1]
            target = open_store(args.into.rstrip("/") + below if below else args.into)
            into = format2.convert if format2.is_here(store) else _into
            copied, shards, written = into(store, target, size)
            print(f"{store.root}: {grouped(copied)} records in {shards} shards, {file_size(written)}, in {target.root}")
            continue
        done = compact(store, shard_bytes=size, purge_age=args.purge)
        print(
            f"{store.root}: {done.before} shards of {file_size(done.bytes_before)} are {done.after} of "
            f"{file_size(done.bytes_after)}; {grouped(done.copied)} records copied, "
            f"{grouped(done.dropped)} superseded ones left behind"
        )
        if done.purged.shards:
            print(f"  removed {grouped(done.purged.shards)} replaced shards of {file_size(done.purged.bytes)}")
        if done.waiting:
            print(
                f"  {grouped(done.waiting)} replaced shards stay for views from before the compaction; compact --purge "
                f"removes them when they are {DEFAULT_AGE} old, and --purge 0s now"
            )
    return 0


def _into(store: Store, target: Store, shard_bytes: int) -> tuple[int, int, int]:
    """Records, shards and bytes of a compact copy of a cache of format 3."""
    done = merge([store], target, shard_bytes=shard_bytes)
    return done.copied, done.shards, done.bytes
