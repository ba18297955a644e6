"""What the tools share: arguments, the caches of a folder, the lock of tools that change a cache. No torch."""

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from distill.cache.format import HEADER, LEDGER, SHARDS, TOOLS_LOCK, row_of, writer_lock
from distill.cache.header import CacheHeader
from distill.cache.ledger import ShardRow
from distill.cache.open_store import open_store
from distill.cache.store import Store
from distill.cache.view import Newest, open_shard
from distill.config.errors import CacheError, ConfigError
from distill.config.paths import home

TOOLS = ("compact", "merge", "repair")
"""Names of ledgers that are not a teacher's."""
_TOGETHER = 256
"""Shards whose indexes are read together."""


# ---------------------------------------------------------------- arguments


def add_folder(
    parser: argparse.ArgumentParser,
    what: str = "a cache, or a folder of caches; a path or a URL like s3://bucket/folder",
) -> None:
    parser.add_argument("dir", metavar="DIR", type=home, help=what)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object a cache, for programs")


def add_shard_mb(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shard-mb",
        type=int,
        default=512,
        metavar="MB",
        help="size of a shard; memory is three times that (%(default)s)",
    )


def shard_bytes(args: argparse.Namespace) -> int:
    """Bytes of --shard-mb; ConfigError: not a size that a shard can have."""
    if not 1 <= args.shard_mb <= 4000:
        raise ConfigError(f"--shard-mb is {args.shard_mb}; allowed is 1 to 4000")
    return int(args.shard_mb) * 1_000_000


def check_distinct(source: str, target: str) -> None:
    """ConfigError where two spellings are one cache."""
    if os.path.realpath(source) == os.path.realpath(target) or source.rstrip("/") == target.rstrip("/"):
        raise ConfigError(f"{target} is both a source and the target")


def check_at_least_one(option: str, value: int | None) -> None:
    """ConfigError for a number below 1; None is a number that is not given."""
    if value is not None and value < 1:
        raise ConfigError(f"{option} is {value}; it is at least 1")


# ---------------------------------------------------------------- caches


def caches(folder: str | Path) -> list[Store]:
    """The cache in `folder`, or those of its folders (a mixture has one for each corpus); CacheError: none."""
    store = open_store(folder)
    if _is_cache(store):
        return [store]
    names = [name for name in store.names("") if not name.startswith(".") and name not in (LEDGER, SHARDS)]
    stores = [each for name in names if _is_cache(each := open_store(f"{store.root}/{name}"))]
    if not stores:
        raise CacheError(f"{store.root}: no cache here ({HEADER} is missing), nor in a folder below it")
    return stores


def _is_cache(store: Store) -> bool:
    """True even for a cache whose header is lost."""
    try:
        return store.exists(HEADER) or bool(store.names(SHARDS))
    except CacheError:  # a file where a folder would be
        return False


def newest_records(
    store: Store, header: CacheHeader, rows: Sequence[ShardRow], advance: Callable[[int], None] = lambda count: None
) -> Newest:
    """Which record of each sample counts, from the indexes of these shards, in the order of `Published.rows`.

    advance: is given the bytes of each index. Raises CacheError as `open_shard`.
    """
    newest = Newest(header.samples)
    for first in range(0, len(rows), _TOGETHER):
        part = rows[first : first + _TOGETHER]
        for row, columns in zip(part, store.map(lambda row: open_shard(store, header, row).columns, part)):
            newest.add(columns.sample_ids, columns.steps)
            advance(row.index_bytes)
    return newest


# ---------------------------------------------------------------- changing a cache


@contextlib.contextmanager
def alone(store: Store, *, dry_run: bool = False) -> Iterator[bool]:
    """No other tool changes the cache meanwhile; CacheError if one does. dry_run: only looks, and writes no lock.

    Yields whether that is certain: a store may have no locks. Two compactions or merges at one time are safe all the
    same: a tool retires only rows that it has copied, and of two that write to one ledger one fails.
    """
    if dry_run:
        if store.is_locked(TOOLS_LOCK):
            raise CacheError(f"{store.path(TOOLS_LOCK)}: another live process compacts, merges or repairs the cache")
        yield False
    else:
        with store.lock(TOOLS_LOCK, "the cache for compact, merge or repair") as is_alone:
            yield is_alone


def is_live(store: Store, writer: str) -> bool:
    """A process holds the writer's lock. Unknown, and False, in a store without locks."""
    return store.is_locked(writer_lock(writer))


def remove_leftovers(store: Store, known: set[str]) -> None:
    """Removes files that a stopped tool left behind; the caller is `alone`."""
    for name in store.names(SHARDS):
        row = row_of(name)
        if row is not None and row.writer in TOOLS and name not in known:
            store.remove(f"{SHARDS}/{name}")
