"""A cache on any file system that fsspec knows: object stores first of all, where nothing grows and nothing is renamed.

An object appears whole when its upload ends, so that a put is a publication. Reads go through a bounded read-ahead of
blocks, since records of a shard are mostly read in its order and a request costs far more than its bytes.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator

import fsspec

from distill.cache.store import Store
from distill.config.errors import CacheError

BLOCK = 4 << 20
"""Bytes of one read."""
BLOCKS = 64
"""Kept at one time, the least recently used first to go."""


class FarStore(Store):
    appends = False

    def __init__(self, url: str):
        self.root = url.rstrip("/")
        with self._reported(""):
            self._fs, self._folder = fsspec.core.url_to_fs(self.root)
        self._blocks: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def names(self, folder: str) -> list[str]:
        with self._reported(folder):
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(self._at(folder), detail=False)
            except FileNotFoundError:
                return []
        return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in found if name.rstrip("/") != self._at(folder))

    def read(self, name: str) -> bytes:
        with self._reported(name):
            data: bytes = self._fs.cat_file(self._at(name))
        return data

    def read_many(self, names: list[str]) -> list[bytes]:
        """Whole files, many requests at a time where the file system can."""
        with self._reported(names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"):
            found = self._fs.cat([self._at(name) for name in names], on_error="raise")
        if isinstance(found, bytes):
            return [found]
        return [found[self._at(name)] for name in names]

    def read_at(self, name: str, start: int, size: int) -> bytes:
        pieces = []
        for number in range(start // BLOCK, -(-(start + size) // BLOCK)):
            block, first = self._block(name, number), number * BLOCK
            pieces.append(block[max(start - first, 0) : start + size - first])
        return b"".join(pieces)

    def size(self, name: str) -> int:
        with self._reported(name):
            return int(self._fs.size(self._at(name)))

    def bytes_in(self, folder: str) -> int:
        with self._reported(folder):
            return sum(int(facts["size"]) for facts in self._fs.find(self._at(folder), detail=True).values())

    def publish(self, name: str, data: bytes) -> None:
        with self._reported(name):
            self._fs.pipe_file(self._at(name), data)

    def create(self, name: str, data: bytes) -> bool:
        with self._reported(name):
            try:
                self._fs.pipe_file(self._at(name), data, mode="create")
            except FileExistsError:
                return False
        return True

    def remove(self, name: str) -> None:
        with self._reported(name), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._at(name))

    def _at(self, name: str) -> str:
        return f"{self._folder}/{name}".rstrip("/")

    def _block(self, name: str, number: int) -> bytes:
        key = (name, number)
        with self._lock:
            if key in self._blocks:
                self._blocks.move_to_end(key)
                return self._blocks[key]
        with self._reported(name):
            data: bytes = self._fs.cat_file(self._at(name), start=number * BLOCK, end=(number + 1) * BLOCK)
        with self._lock:
            self._blocks[key] = data
            while len(self._blocks) > BLOCKS:
                self._blocks.popitem(last=False)
        return data

    @contextlib.contextmanager
    def _reported(self, name: str) -> Iterator[None]:
        """Client libraries raise errors of their own; whatever one says is told with the file's name."""
        try:
            yield
        except CacheError:
            raise
        except Exception as error:
            raise CacheError(f"{self.path(name)}: {error or type(error).__name__}") from error
