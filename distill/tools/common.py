"""What the tools share: arguments, the caches of a folder, the lock of tools that change a cache. No torch."""

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from distill.cache.format import CATALOG, HEADER, LOCKS, QUARANTINE, SHARDS, TOOLS_LOCK, writer_lock
from distill.cache.open_store import open_store
from distill.cache.store import Store
from distill.config.errors import CacheError, ConfigError
from distill.config.paths import home, is_url
from distill.config.units import file_size

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
    if _place(source) == _place(target):
        raise ConfigError(f"{target} is both a source and the target")


def _place(folder: str) -> object:
    """What all spellings of a folder have in common."""
    folder = folder.removeprefix("file://")
    if is_url(folder):
        scheme, _, rest = folder.partition("://")
        return scheme, [part for part in rest.split("/") if part]
    try:
        there = os.stat(home(folder))
    except OSError:
        return os.path.realpath(home(folder))
    return there.st_dev, there.st_ino


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
    own = (SHARDS, CATALOG, LOCKS, QUARANTINE)
    names = [name for name in store.names("") if not name.startswith(".") and name not in own]
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


# ---------------------------------------------------------------- changing a cache


@contextlib.contextmanager
def alone(store: Store, *, dry_run: bool = False) -> Iterator[bool]:
    """No other tool changes the cache meanwhile; CacheError if one does. dry_run: only looks, and writes no lock.

    Yields whether that is certain: a store may have no locks. Two compactions or merges at one time are safe all the
    same: a shard replaces only shards whose records it has, and of two tools that publish one number one fails.
    """
    if dry_run:
        if store.is_locked(TOOLS_LOCK):
            raise CacheError(f"{store.path(TOOLS_LOCK)}: another live process changes the cache with a tool")
        yield False
    else:
        with store.lock(TOOLS_LOCK, "the cache for a tool that changes it") as is_alone:
            yield is_alone


def is_live(store: Store, writer: str) -> bool:
    """A process holds the writer's lock. Unknown, and False, in a store without locks."""
    return store.is_locked(writer_lock(writer))


def blocked_locks(store: Store) -> list[str]:
    """Names of writers' locks that something else than a file has, so that nothing can hold them."""
    names = [f"{LOCKS}/{name}" for name in store.names(LOCKS) if name.endswith(".lock")]
    return [name for name in names if name != TOOLS_LOCK and store.is_blocked(name)]


def check_room(store: Store, needed: int, what: str) -> None:
    """CacheError where a disk has less room than what is about to be written; `what` names it."""
    if (free := store.free()) < needed:
        raise CacheError(f"{store.root}: {what} needs {file_size(needed)}, and its disk has {file_size(free)} left")
