"""Many shards into few: the newest record of each sample, copied as bytes, in the order of the teacher's steps.

That order, not that of ids, is the one in which students come back to the records. Shards that are large enough and
hold nothing superseded stay as they are, so that the work goes with what has come since the last time. The last thing
written is the row that retires what was copied: whatever stops the work before leaves records twice, which do no
harm, and which the next compaction takes away. Rows that appear meanwhile are not touched.
"""

import argparse
from typing import NamedTuple

from distill.cache.format import SHARDS
from distill.cache.header import CacheHeader
from distill.cache.ledger import ShardRow
from distill.cache.open_store import open_store
from distill.cache.shard import Array, Shard
from distill.cache.store import Store
from distill.cache.view import open_shard, published
from distill.config.errors import ConfigError
from distill.config.paths import home
from distill.config.terminal import advancing
from distill.config.units import file_size, grouped
from distill.tools import common
from distill.tools.merge import merge
from distill.tools.repack import Packer, in_order, portion
from distill.tools.token_counter import TokenCounter


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
    purged: int
    """Bytes of replaced files that were removed."""
    waiting: int
    """Bytes of replaced files that are still there."""


def compact(store: Store, *, shard_bytes: int, purge: bool = False) -> Compaction:
    """Compacts one cache in its place.

    shard_bytes: of records in a shard; memory is about three times as much. purge: remove the files of retired rows;
    who reads an older view then gets a CacheError.

    Raises:
        CacheError: damage (then nothing is retired), another tool at work, or a file that cannot be written.
    """
    header = CacheHeader.load(store)
    with common.alone(store) as is_alone:
        rows, retired = published(store, header)
        if is_alone:
            common.remove_leftovers(store, {row.shard for row in rows + retired})
        keep = _choose(store, header, rows, shard_bytes)
        chosen = in_order(row for row in rows if row.shard in keep)
        packer = Packer(store, "compact", header.identity, shard_bytes)
        with advancing("compact", sum(row.bytes for row in chosen)) as advance:
            counter = TokenCounter(store, header) if chosen else None
            for row in chosen:
                if len(keep[row.shard]) and counter:
                    shard = Shard(store, row)
                    packer.add(portion(shard, shard.span(0, row.samples), keep[row.shard], counter))
                advance(row.bytes)
            packer.flush()
        packer.retire(chosen)
        there = set(store.names(SHARDS))
        replaced = [row for row in published(store, header).retired if row.shard in there]
        for row in replaced if purge else []:
            store.remove(f"{SHARDS}/{row.shard}")
    after = [row for row in rows if row.shard not in keep] + packer.rows
    copied = sum(map(len, keep.values()))
    waiting = sum(row.bytes for row in replaced)
    return Compaction(
        before=len(rows),
        after=len(after),
        copied=copied,
        dropped=sum(row.samples for row in chosen) - copied,
        bytes_before=sum(row.bytes for row in rows),
        bytes_after=sum(row.bytes for row in after),
        purged=waiting if purge else 0,
        waiting=0 if purge else waiting,
    )


def _choose(store: Store, header: CacheHeader, rows: list[ShardRow], shard_bytes: int) -> dict[str, Array]:
    """For each shard to replace, the places in it whose records stay."""
    newest, keep = common.newest_records(store, header, rows), {}
    for number, row in enumerate(rows):
        places = newest.of(number, open_shard(store, header, row).columns.sample_ids)
        if len(places) < row.samples or row.bytes - row.index_bytes < shard_bytes / 2:
            keep[row.shard] = places
    if len(keep) == 1 and all(len(keep[row.shard]) == row.samples for row in rows if row.shard in keep):
        return {}  # the rest of an earlier compaction, alone
    return keep


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_folder(parser)
    common.add_shard_mb(parser)
    parser.add_argument(
        "--purge", action="store_true",
        help="remove the files of replaced shards; views from before the compaction cannot be read any more",
    )  # fmt: skip
    parser.add_argument(
        "--into", metavar="NEW", type=home, help="leave the cache as it is and write a compact one there"
    )


def run(args: argparse.Namespace) -> int:
    if args.into and args.purge:
        raise ConfigError("--purge is no option of --into, which replaces nothing")
    size, stores = common.shard_bytes(args), common.caches(args.dir)
    for store in stores:
        if args.into:
            common.check_distinct(store.root, args.into)
            below = "" if len(stores) == 1 else "/" + store.root.rsplit("/", 1)[-1]
            target = open_store(args.into.rstrip("/") + below if below else args.into)
            merged = merge([store], target, shard_bytes=size)
            print(
                f"{store.root}: {grouped(merged.copied)} records in {merged.shards} shards, "
                f"{file_size(merged.bytes)}, in {target.root}"
            )
            continue
        done = compact(store, shard_bytes=size, purge=args.purge)
        print(
            f"{store.root}: {done.before} shards of {file_size(done.bytes_before)} are {done.after} of "
            f"{file_size(done.bytes_after)}; {grouped(done.copied)} records copied, "
            f"{grouped(done.dropped)} superseded ones left behind"
        )
        if done.purged:
            print(f"  removed {file_size(done.purged)} of replaced files")
        if done.waiting:
            print(f"  {file_size(done.waiting)} of replaced files stay until compact --purge")
    return 0
