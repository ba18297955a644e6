"""The interface of a store: the folder of a cache's files, local (`local.py`) or far away (`far.py`). No torch.

Names of files are relative to that folder, with `/`. A file is put in place at one stroke: a kill or a power cut at any
moment leaves the old state or the new one.
"""

import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

from distill.config.errors import CacheError

T = TypeVar("T")
U = TypeVar("U")


class Store(ABC):
    """One folder.

    Methods raise CacheErrors that name the file; the cause is a FileNotFoundError where the file is missing.
    """

    root: str
    """Path or URL, as it was given."""
    slow: bool
    """Requests take long: they are few and large, and many are sent at one time."""

    @property
    def place(self) -> str:
        """Path or URL that is the same in a process with another working folder."""
        return self.root

    def path(self, name: str) -> str:
        """Path or URL of a file, for messages."""
        return f"{self.root}/{name}".rstrip("/")

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """Names of the files and folders in `folder`, sorted; none if there is no such folder."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The bytes of a whole file."""

    @abstractmethod
    def read_at(self, name: str, start: int, size: int) -> bytes:
        """`size` bytes from `start`, fewer where the file ends."""

    def read_ahead(self, name: str, start: int, size: int) -> bytes:
        """`read_at` of a file that never changes; a slow store fetches more at once for reads that go on in order."""
        return self.read_at(name, start, size)

    def map(self, function: Callable[[T], U], items: Iterable[T]) -> list[U]:
        """Results of a function that reads, in the order of `items`; a slow store calls it in parallel."""
        return [function(item) for item in items]

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a file."""

    def exists(self, name: str) -> bool:
        """Whether there is something of this name."""
        try:
            self.size(name)
        except CacheError as error:
            if is_missing(error):
                return False
            raise
        return True

    def modified(self, name: str) -> float:
        """Seconds since 1970 of a file's last change; now, where the store does not say."""
        return time.time()

    def is_blocked(self, name: str) -> bool:
        """Whether something that is no file has a file's name: a folder, a FIFO, a link to nothing."""
        return False

    @abstractmethod
    def bytes_in(self, folder: str) -> int:
        """Bytes of all files in a folder and the folders in it; 0 if there is no such folder."""

    def is_folder(self, name: str) -> bool:
        """Whether it is a folder, not a file."""
        return bool(self.names(name))

    def is_alias(self, name: str) -> bool:
        """Whether it is a link to what is there in this store under another name."""
        return False

    def free(self) -> float:
        """Bytes that still have room; infinity where the store does not say."""
        return math.inf

    def make_folders(self, *names: str) -> None:  # noqa: B027 (object stores have no folders)
        """Makes folders, where a file needs one to lie in."""

    @abstractmethod
    def publish(self, name: str, data: bytes) -> None:
        """Puts a file in place, over one that may be there."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Puts a file in place unless there is one; False: there was."""

    @abstractmethod
    def publish_parts(self, name: str, parts: Iterable[bytes]) -> int:
        """Puts a large file in place, part after part, under a name that no other process uses; returns its bytes."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""

    @abstractmethod
    def move(self, name: str, to: str) -> None:
        """Gives a file another name, over one that may be there."""

    def lock(self, name: str, holder: str, *, wait: bool = False) -> AbstractContextManager[bool]:
        """Holds a lock file within the block. Yields False, and holds nothing, in a store without locks.

        Raises:
            CacheError: `wait` is false and another live process has it, for what `holder` names.
        """
        return contextlib.nullcontext(False)

    def is_locked(self, name: str) -> bool:
        """Whether a live process holds a lock file; False in a store without locks."""
        return False


def is_missing(error: CacheError) -> bool:
    """Whether an error of a store is that of a file which is not there."""
    return isinstance(error.__cause__, FileNotFoundError | NotADirectoryError)


@contextlib.contextmanager
def reported(path: Path | str) -> Iterator[None]:
    """Turns an OSError into a CacheError that names the file and the reason."""
    try:
        yield
    except OSError as error:
        raise CacheError(f"{path}: {error.strerror or error}") from error
