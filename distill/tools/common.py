"""What the tools share: the caches of a folder, one changing tool at a time, ledgers of their own. No torch."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from distill.cache.format import HEADER, LEDGER, QUARANTINE, SHARDS, TEMPORARY, TOOLS_LOCK, writer_lock
from distill.cache.ledger import LedgerWriter
from distill.cache.open_store import open_store
from distill.cache.store import Store
from distill.config.errors import CacheError

TOOLS = ("compact", "merge", "repair")
"""Names of ledgers that are not a teacher's."""


def caches(folder: str | Path) -> list[Store]:
    """The cache in `folder`, or those of its folders (a mixture has one for each corpus); CacheError: none."""
    store = open_store(folder)
    if _is_cache(store):
        return [store]
    names = [name for name in store.names("") if not name.startswith(".") and name not in (LEDGER, SHARDS)]
    found = [each for name in names if _is_cache(each := open_store(f"{store.root}/{name}"))]
    if not found:
        raise CacheError(f"{store.root}: no cache here ({HEADER} is missing), nor in a folder below it")
    return found


def _is_cache(store: Store) -> bool:
    """Even one whose header is lost."""
    try:
        return store.exists(HEADER) or bool(store.names(SHARDS))
    except CacheError:  # a file where a folder would be
        return False


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


class ToolLedger:
    """The ledger that a kind of tool has, opened when it is first needed; the caller holds `alone`."""

    def __init__(self, store: Store, kind: str, identity: str):
        self.store, self.kind, self.identity = store, kind, identity
        self._ledger: LedgerWriter | None = None

    def get(self) -> LedgerWriter:
        """CacheError when it cannot be made."""
        if self._ledger is None:
            self._ledger = LedgerWriter(self.store, self.kind, self.identity)
        return self._ledger


def remove_leftovers(store: Store, known: set[str]) -> None:
    """Files that a stopped tool left behind; the caller is `alone`."""
    for name in store.names(SHARDS):
        found = writer_of(name)
        if found is not None and found[0] in TOOLS and name not in known:
            store.remove(f"{SHARDS}/{name}")


def writer_of(shard: str) -> tuple[str, int] | None:
    """Ledger and row number in a shard's file name; None: it is not a shard's."""
    parts = shard.removesuffix(TEMPORARY).removesuffix(".safetensors").rsplit("-", 2)
    if len(parts) != 3 or not parts[1].isdigit() or ".safetensors" not in shard:
        return None
    return parts[0], int(parts[1])


def to_quarantine(store: Store, name: str, *, copy: bool = False) -> None:
    """Takes a file out of the cache, or a copy of it, and keeps it under a name that is free."""
    plain = f"{QUARANTINE}/{name.replace('/', '-') if name.startswith(LEDGER) else name.rsplit('/', 1)[-1]}"
    kept, number = plain, 1
    store.make_folders(QUARANTINE)
    data = store.read(name)
    while store.exists(kept) and store.read(kept) != data:
        kept, number = f"{plain}.{number}", number + 1
    store.publish(kept, data)
    if not copy:
        store.remove(name)


class Bar:
    """A progress bar in bytes, where someone looks."""

    def __init__(self, what: str, total: int):
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm  # slow to load for a tool that answers at once

            self._bar = tqdm(
                desc=what, total=total, unit="B", unit_scale=True, leave=False, dynamic_ncols=True, file=sys.stderr
            )

    def add(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()


def ranges(numbers: list[int]) -> str:
    """`0 to 4, 7, 9 to 12` of ascending numbers."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{a} to {b}" if b > a else str(a) for a, b in spans)
