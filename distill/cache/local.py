"""A cache in a local folder: files grow, and flock locks them until their process ends, however it ends."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from distill.cache.format import TEMPORARY
from distill.cache.store import Store, reported
from distill.config.errors import CacheError
from distill.config.files import replacing, sync, write_all


class LocalStore(Store):
    grows = True
    slow = False

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
        """Not by mapping: a mapped file that another process cuts short kills its reader with SIGBUS."""
        with reported(self.folder / name), _opened(self.folder / name, os.O_RDONLY) as fd:
            data = os.pread(fd, size, start)
            while 0 < len(data) < size and (more := os.pread(fd, size - len(data), start + len(data))):
                data += more
            return data

    def size(self, name: str) -> int:
        with reported(self.folder / name):
            return (self.folder / name).stat().st_size

    def bytes_in(self, folder: str) -> int:
        with reported(self.folder / folder):
            return sum(path.stat().st_size for path in (self.folder / folder).rglob("*") if path.is_file())

    def make_folders(self, *names: str) -> None:
        for name in names:
            with reported(self.folder / name):
                (self.folder / name).mkdir(parents=True, exist_ok=True)

    def publish(self, name: str, data: bytes) -> None:
        path = self.folder / name
        # One name for every process, so that what a kill left is recognized and written over.
        temporary = path.with_name(path.name + TEMPORARY)
        with (
            reported(path),
            replacing(path, temporary),
            _opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd,
        ):
            write_all(fd, data)

    def create(self, name: str, data: bytes) -> bool:
        with self.lock(".lock", "the cache's creation", wait=True):
            if self.exists(name):
                return False
            self.publish(name, data)
        return True

    def remove(self, name: str) -> None:
        with reported(self.folder / name):
            (self.folder / name).unlink(missing_ok=True)

    def append(self, name: str, data: bytes) -> None:
        path = self.folder / name
        with reported(path):
            is_new = not path.exists()
            with _opened(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as fd:
                write_all(fd, data)
                os.fsync(fd)
            if is_new:
                sync(path.parent)

    def truncate(self, name: str, size: int) -> None:
        with reported(self.folder / name):
            os.truncate(self.folder / name, size)
            sync(self.folder / name)

    @contextlib.contextmanager
    def lock(self, name: str, holder: str, *, wait: bool = False) -> Iterator[bool]:
        path = self.folder / name
        with contextlib.ExitStack() as stack:
            with reported(path):
                fd = stack.enter_context(_opened(path, os.O_RDWR | os.O_CREAT))
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                except BlockingIOError as error:
                    pid = os.pread(fd, 32, 0).decode(errors="replace") or "unknown"
                    raise CacheError(f"{path}: another live process (pid {pid}) holds {holder}") from error
            # Only for the message above: a full disk must not keep the lock from being held.
            with contextlib.suppress(OSError):
                os.ftruncate(fd, 0)
                os.pwrite(fd, str(os.getpid()).encode(), 0)
            yield True

    def is_locked(self, name: str) -> bool:
        """Opened for reading only: the file may lie on a read-only file system."""
        path = self.folder / name
        with reported(path), contextlib.suppress(FileNotFoundError), _opened(path, os.O_RDONLY) as fd:
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags, 0o666)
    try:
        yield fd
    finally:
        os.close(fd)
