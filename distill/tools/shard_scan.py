"""Files of `shards/` read without trust: what each is, and which of its records verify. No torch, unless they are
decoded."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.cache.entries import Array, entries_of
from distill.cache.format import SHARDS, TEMPORARY, WRITER, shard_of
from distill.cache.header import CacheHeader
from distill.cache.loss_curve import LossSums
from distill.cache.origins import Origin
from distill.cache.seal import digest
from distill.cache.shard import Shard, check, front_of
from distill.cache.shard_header import ShardHeader
from distill.cache.store import Store, is_missing
from distill.config.errors import CacheError
from distill.tools.token_counter import TokenCounter

_BLOCK = 8 << 20
"""Bytes of one read."""
_NO_FILE = (errno.EISDIR, errno.ESPIPE, errno.ENXIO, errno.ELOOP, errno.EIO)
"""Errors of reading what is not a plain file, or lies on a bad part of a disk."""

Place = tuple[str, int]
"""Writer and number of a shard."""


class ShardFiles(NamedTuple):
    """What lies in `shards/`."""

    files: list[str]
    """Shards, and what is not a shard."""
    temporary: list[str]
    """Files that were being written."""
    others: list[str]
    """Folders that no writer makes, and hidden files: nothing looks into them."""


def shard_files(store: Store, root: str = SHARDS) -> ShardFiles:
    """Names of all that lies in `shards/`, or in another folder that is laid out like it."""
    found = ShardFiles([], [], [])

    def walk(folder: str, depth: int) -> None:
        for name in store.names(folder):
            path = f"{folder}/{name}"
            if store.is_alias(path):  # what it is an alias of has a name of its own
                found.others.append(path)
            elif shard_of(path) is not None:
                found.files.append(path)
            elif store.is_folder(path):
                if (depth == 0 and WRITER.fullmatch(name)) or (depth == 1 and name.isdecimal()):
                    walk(path, depth + 1)
                else:
                    found.others.append(path)
            else:
                (
                    found.temporary if name.endswith(TEMPORARY) else found.others if name[0] == "." else found.files
                ).append(path)

    walk(root, 0)
    return found


class Rows(NamedTuple):
    """Records in a file: where they lie, and what each must be."""

    entries: Array
    """ENTRY [n], in the order of the file; the field `origin` is a number in `origins`."""
    records_at: int
    """Where the records begin in the file."""
    origins: tuple[Origin, ...]


@dataclass(frozen=True)
class ShardScan:
    """One file, whatever its state."""

    name: str
    problems: list[str] = field(default_factory=list)
    """Of its bytes, whatever its name is."""
    header: ShardHeader | None = None
    """If it verifies; without origins and losses."""
    key: str = ""
    """Digest of the header's bytes, which has one of all others."""

    @property
    def place(self) -> Place | None:
        """By the file's name; None: it is not a shard's name."""
        return shard_of(self.name)

    @property
    def own(self) -> Place | None:
        """By its header."""
        return None if self.header is None else (self.header.writer, self.header.seq)

    @property
    def belongs(self) -> str:
        """Whose it is by its header, and what its name says, where that is another one."""
        assert self.own is not None
        expected = "" if self.place is None else f", expected shard {self.place[1]} of writer {self.place[0]}"
        return f"it is shard {self.own[1]} of writer {self.own[0]}{expected}"

    @property
    def is_whole(self) -> bool:
        return not self.problems


def examine(
    store: Store, cache: CacheHeader, name: str, *, counter: TokenCounter | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> ShardScan:  # fmt: skip
    """Verifies every byte of a file as a shard.

    counter: decodes the records, too. advance: is given the bytes that have been read. Raises CacheError: the file may
    be good, and cannot be read: no permission, or no connection.
    """
    path = store.path(name)
    header = None
    try:
        front = front_of(store, cache, name)
        header = dataclasses.replace(front.header, origins=(), losses=LossSums())
        shard = Shard(store, cache, header.writer, header.seq, front, name)
        if store.slow and (size := store.size(name)) != shard.size:
            raise CacheError(f"{shard.name} is damaged: {size} bytes, {shard.size} by its header")
    except CacheError as error:
        cause = error.__cause__
        if cause and not isinstance(cause, ValueError) and not is_missing(error) and not is_no_file(cause):
            raise
        if is_no_file(cause):
            error = CacheError(f"{error}: expected a file that is a shard")
        return ShardScan(name, [str(error)], header)
    rows = Rows(entries_of(shard), shard.records_at, shard.header.origins)
    good = sound(store, name, rows, counter=counter, advance=advance)
    bad = rows.entries["sample"][~good].tolist()
    why = "does not verify" if counter is None else "does not verify, or is not a record"
    return ShardScan(
        name, [f"{path} is damaged: sample {each} {why}" for each in bad], header, digest(front.data[: front.size])
    )


def is_no_file(cause: BaseException | None) -> bool:
    """Whether an error is one of what the file is, and not of who reads it or how."""
    return getattr(cause, "errno", None) in _NO_FILE


def read_part(store: Store, name: str, at: int, size: int) -> bytes:
    """`Store.read_at`, but nothing of what is no plain file, or lies on a bad part of a disk."""
    try:
        return store.read_at(name, at, size)
    except CacheError as error:
        if is_missing(error) or is_no_file(error.__cause__):
            return b""
        raise


def runs(entries: Array) -> Iterator[tuple[int, int]]:
    """Runs of records that lie within about 8 MB: first and end of each."""
    first = 0
    starts, ends = entries["start"].astype(np.int64), entries["start"].astype(np.int64) + entries["size"]
    while first < len(entries):
        end = max(int(np.searchsorted(ends, starts[first] + _BLOCK, side="right")), first + 1)
        yield first, end
        first = end


def sound(
    store: Store, name: str, rows: Rows, *, counter: TokenCounter | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> NDArray[np.bool_]:  # fmt: skip
    """Which records verify and, where there is a counter, can be decoded."""
    entries, good = rows.entries, np.zeros(len(rows.entries), np.bool_)
    for first, end in runs(entries):
        at = rows.records_at + int(entries["start"][first])
        size = int(entries["start"][end - 1]) + int(entries["size"][end - 1]) - int(entries["start"][first])
        data = memoryview(read_part(store, name, at, size))
        advance(size)
        parts = list[memoryview]()
        for i, entry in enumerate(entries[first:end], start=first):
            start = rows.records_at + int(entry["start"]) - at
            parts.append(part := data[start : start + int(entry["size"])])
            is_there = len(part) == entry["size"]
            good[i] = is_there and check(int(entry["sample"]), int(entry["digest"]), part) == entry["check"]
        if counter is not None:
            places = [i for i in range(first, end) if good[i]]
            counts = counter([bytes(parts[i - first]) for i in places], entries["atoms"][places].tolist())
            good[places] = [count is not None for count in counts]
    return good
