"""Where the files of a cache lie: a local folder, or a folder of any file system that fsspec knows. No torch.

Whoever writes puts a file in place at one stroke; a kill or a power cut at any moment leaves the old state or the new
one. Names are relative to the cache's folder, with `/`. Errors are CacheErrors that name the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from distill.cache.local_files import publish, read_at, reported
from distill.config.errors import CacheError
from distill.config.files import sync, write_all
from distill.config.paths import home
from distill.config.paths import is_url as is_url

T = TypeVar("T")
U = TypeVar("U")


class Store(ABC):
    """One folder."""

    root: str
    appends: bool
    """Files can grow and be locked, and reading one is quick. Otherwise a ledger is one object for each row, and a
    request takes long: readers ask for much at a time, and for many things at one time."""

    def path(self, name: str) -> str:
        """Of a file, for messages."""
        return f"{self.root}/{name}".rstrip("/")

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """Names of the files and folders in `folder`, sorted; none if there is no such folder."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A whole file; CacheError from a FileNotFoundError if there is none."""

    @abstractmethod
    def read_at(self, name: str, start: int, size: int) -> bytes:
        """`size` bytes from `start`, fewer where the file ends."""

    def read_ahead(self, name: str, start: int, size: int) -> bytes:
        """The same of a file that never changes, for one who mostly reads on from where the last read ended."""
        return self.read_at(name, start, size)

    def read_many(self, names: list[str]) -> list[bytes]:
        """Whole files."""
        return [self.read(name) for name in names]

    def map(self, function: Callable[[T], U], items: Iterable[T]) -> list[U]:
        """Of functions that read: at one time where that is quicker."""
        return [function(item) for item in items]

    @abstractmethod
    def size(self, name: str) -> int: ...

    @abstractmethod
    def publish(self, name: str, data: bytes) -> None:
        """Puts a file in place, over one that may be there."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Puts a file in place unless there is one; False: there was."""

    @abstractmethod
    def remove(self, name: str) -> None: ...

    @abstractmethod
    def bytes_in(self, folder: str) -> int:
        """Size of all files in a folder and the folders in it; 0 if there is no such folder."""

    def exists(self, name: str) -> bool:
        try:
            self.size(name)
        except CacheError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return False
            raise
        return True


def open_store(folder: str | Path) -> Store:
    """The store of a path, or of a URL like s3://bucket/folder or memory://folder."""
    if is_url(folder):
        from distill.cache.far import FarStore  # fsspec is slow to load and seldom needed

        return FarStore(str(folder))
    return LocalStore(home(str(folder).removeprefix("file://")))


class LocalStore(Store):
    appends = True

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.root = str(folder)

    def names(self, folder: str) -> list[str]:
        with reported(self.folder / folder):
            try:
                return sorted(os.listdir(self.folder / folder))
            except FileNotFoundError:
                return []

    def read(self, name: str) -> bytes:
        with reported(self.folder / name):
            return (self.folder / name).read_bytes()

    def read_at(self, name: str, start: int, size: int) -> bytes:
        with reported(self.folder / name):
            return read_at(self.folder / name, start, size)

    def size(self, name: str) -> int:
        with reported(self.folder / name):
            return (self.folder / name).stat().st_size

    def bytes_in(self, folder: str) -> int:
        with reported(self.folder / folder):
            return sum(path.stat().st_size for path in (self.folder / folder).rglob("*") if path.is_file())

    def publish(self, name: str, data: bytes) -> None:
        publish(self.folder / name, data)

    def create(self, name: str, data: bytes) -> bool:
        with locked(self.folder / ".lock", "the cache's creation", wait=True):
            if self.exists(name):
                return False
            self.publish(name, data)
        return True

    def remove(self, name: str) -> None:
        with reported(self.folder / name):
            (self.folder / name).unlink(missing_ok=True)

    def make_folders(self, *names: str) -> None:
        for name in names:
            with reported(self.folder / name):
                (self.folder / name).mkdir(parents=True, exist_ok=True)

    def append(self, name: str, data: bytes) -> None:
        """Appends durably; on an error part of the data may be there."""
        with reported(self.folder / name):
            new = not (self.folder / name).exists()
            fd = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                write_all(fd, data)
                os.fsync(fd)
            finally:
                os.close(fd)
            if new:
                sync((self.folder / name).parent)

    def truncate(self, name: str, size: int) -> None:
        with reported(self.folder / name):
            os.truncate(self.folder / name, size)
            sync(self.folder / name)


def is_locked(path: Path) -> bool:
    """A live process holds an exclusive flock on `path`. Only a look: it may lie on a read-only file system."""
    with reported(path):
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
    return False


@contextlib.contextmanager
def locked(path: Path, holder: str, *, wait: bool) -> Iterator[None]:
    """Holds an exclusive flock on `path`; the kernel releases it when the process ends, however it ends.

    Raises:
        CacheError: `wait` is false and another live process holds it; `holder` says what for.
    """
    with reported(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            with reported(path):
                fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except CacheError as error:
            if isinstance(error.__cause__, BlockingIOError):
                pid = os.pread(fd, 32, 0).decode(errors="replace") or "unknown"
                raise CacheError(f"{path}: another live process (pid {pid}) holds {holder}") from error
            raise
        # Only for the message above: a full disk must not keep the lock from being held.
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
            os.pwrite(fd, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(fd)
