"""A cache on any file system of fsspec: object stores first of all, where no file grows and none is renamed.

An object appears whole when its upload ends, so that a put publishes it. The client library repeats requests that fail
(s3fs: five times, with growing waits).
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import fsspec

from distill.cache.ahead import ReadAhead
from distill.cache.store import Store
from distill.config.errors import CacheError

T = TypeVar("T")
U = TypeVar("U")

REQUESTS = 32
"""Requests at one time."""


class FarStore(Store):
    slow = True

    def __init__(self, url: str):
        """Raises CacheError: no such file system, its library is not installed, or access is denied."""
        self.root = url.rstrip("/")
        self._open()

    def _open(self) -> None:
        self._pid = os.getpid()
        with self._reported(""):
            # No listing is kept, nor a size that comes from one, so that new files of other processes appear.
            self._fs_here, self._folder = fsspec.core.url_to_fs(self.root, use_listings_cache=False)
        self._pool = ThreadPoolExecutor(REQUESTS, "far-store")
        self._ahead = ReadAhead(self._range)

    @property
    def _fs(self) -> Any:
        """The file system, opened anew after a fork, which connections and threads do not survive."""
        if self._pid != os.getpid():
            self._open()
        return self._fs_here

    def names(self, folder: str) -> list[str]:
        with self._reported(folder):
            try:
                paths = self._fs.ls(self._at(folder), detail=False)
            except FileNotFoundError:
                return []
        return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in paths if name.rstrip("/") != self._at(folder))

    def read(self, name: str) -> bytes:
        with self._reported(name):
            data: bytes = self._fs.cat_file(self._at(name))
        return data

    def read_at(self, name: str, start: int, size: int) -> bytes:
        return self._range(name, start, start + size) if size else b""

    def read_ahead(self, name: str, start: int, size: int) -> bytes:
        _ = self._fs  # opens the file system, and with it the read-ahead, anew after a fork
        return self._ahead.read(name, start, size) if size else b""

    def size(self, name: str) -> int:
        with self._reported(name):
            return int(self._fs.size(self._at(name)))

    def bytes_in(self, folder: str) -> int:
        with self._reported(folder):
            return sum(int(info["size"]) for info in self._fs.find(self._at(folder), detail=True).values())

    def publish(self, name: str, data: bytes) -> None:
        with self._reported(name):
            self._fs.pipe_file(self._at(name), data)

    def publish_parts(self, name: str, parts: Iterable[bytes]) -> int:
        size = 0
        with self._reported(name), self._fs.open(self._at(name), "wb") as file:
            for part in parts:
                file.write(part)
                size += len(part)
        return size

    def move(self, name: str, to: str) -> None:
        with self._reported(name):
            self._fs.copy(self._at(name), self._at(to))
            self._fs.rm_file(self._at(name))

    def create(self, name: str, data: bytes) -> bool:
        """As `Store.create`, but also True where the same bytes are there: a put whose answer was lost is sent twice.

        Two processes that create a file at one moment both succeed where the file system has no conditional put. S3,
        Google, Azure and memory have it.
        """
        path = self._at(name)
        with self._reported(name):
            if not self._fs.exists(path):
                try:
                    self._create(path, data)
                except Exception:  # errors for "there is one" differ between libraries; what is there decides
                    if not self._fs.exists(path):
                        raise
                else:
                    return True
            return bool(self._fs.cat_file(path) == data)

    def remove(self, name: str) -> None:
        with self._reported(name), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._at(name))

    def map(self, function: Callable[[T], U], items: Iterable[T]) -> list[U]:
        _ = self._fs
        return list(self._pool.map(function, items))

    def _at(self, name: str) -> str:
        return f"{self._folder}/{name}".rstrip("/")

    def _range(self, name: str, start: int, end: int) -> bytes:
        with self._reported(name):
            data: bytes = self._fs.cat_file(self._at(name), start=start, end=end)
        return data

    def _create(self, path: str, data: bytes) -> None:
        try:
            self._fs.pipe_file(path, data, mode="create")
        except (TypeError, ValueError, NotImplementedError):  # no conditional put
            self._fs.pipe_file(path, data)

    @contextlib.contextmanager
    def _reported(self, name: str) -> Iterator[None]:
        """Turns any error of a client library into a CacheError that names the file and the reason."""
        try:
            yield
        except CacheError:
            raise
        except FileNotFoundError as error:
            raise CacheError(f"{self.path(name)}: no such file, folder or bucket") from error
        except Exception as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise CacheError(f"{self.path(name)}: {reason}") from error
