"""A cache in a local folder; flock locks its files until their process ends, however it ends."""

import contextlib
import errno
import fcntl
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from distill.cache.format import TEMPORARY
from distill.cache.store import Store, reported
from distill.config.errors import CacheError
from distill.config.files import naming, replacing, sync, write_all

_WHOLE = 1 << 28
"""Bytes of the largest file that is read whole; a sparse one may say that it has any number."""
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_NEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
_held: set[int] = set()
"""Descriptors of lock files. A child of a fork closes them: its parent alone holds the locks."""


def _let_go() -> None:
    for fd in _held:
        os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


class LocalStore(Store):
    slow = False

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).absolute()  # the process may move to another working folder
        self.root = str(folder)
        self._prefix = f"{self.folder}/"

    @property
    def place(self) -> str:
        return str(self.folder)

    def names(self, folder: str) -> list[str]:
        with reported(self.folder / folder):
            try:
                return sorted(os.listdir(self.folder / folder))
            except OSError as error:
                if error.errno not in _NOT_THERE:
                    raise
                return []

    def read(self, name: str) -> bytes:
        if (size := self.size(name)) > _WHOLE:
            raise CacheError(f"{self.path(name)} is damaged: {size} bytes, expected at most {_WHOLE}")
        return self.read_at(name, 0, size)

    def read_at(self, name: str, start: int, size: int) -> bytes:
        """Not by mapping: a mapped file that another process cuts short kills its reader with SIGBUS."""
        path = self._prefix + name
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO in a file's place would be waited for
            try:
                data = os.pread(fd, size, start)
                while 0 < len(data) < size and (more := os.pread(fd, size - len(data), start + len(data))):
                    data += more
                return data
            finally:
                os.close(fd)
        except OSError as error:
            raise CacheError(f"{path}: {error.strerror or error}") from error

    def size(self, name: str) -> int:
        with reported(self.folder / name):
            return (self.folder / name).stat().st_size

    def exists(self, name: str) -> bool:
        with reported(self.folder / name):
            try:
                os.lstat(self._prefix + name)
            except OSError as error:
                if error.errno not in _NOT_THERE:
                    raise
                return False
            return True

    def is_blocked(self, name: str) -> bool:
        path = self.folder / name
        with reported(path):
            return not path.is_file() and self.exists(name)

    def modified(self, name: str) -> float:
        """Now, of a file that is gone meanwhile."""
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / name).stat().st_mtime
        return time.time()

    def bytes_in(self, folder: str) -> int:
        with reported(self.folder / folder):
            return sum(path.stat().st_size for path in (self.folder / folder).rglob("*") if path.is_file())

    def free(self) -> float:
        disk = os.statvfs(self.folder)
        return disk.f_bavail * disk.f_frsize

    def make_folders(self, *names: str) -> None:
        for name in names:
            with reported(self.folder / name):
                _make(self.folder / name)

    def is_folder(self, name: str) -> bool:
        with reported(self.folder / name):
            return (self.folder / name).is_dir()

    def is_alias(self, name: str) -> bool:
        path = self.folder / name
        with reported(path):
            if not path.is_symlink() or not path.exists():
                return False
            return os.path.realpath(path).startswith(f"{os.path.realpath(self.root)}/")

    def publish(self, name: str, data: bytes) -> None:
        path = self.folder / name
        # One name for every process, so that what a kill left is recognized and written over.
        self._publish(path, path.with_name(path.name + TEMPORARY), [data])

    def publish_parts(self, name: str, parts: Iterable[bytes]) -> int:
        path = self.folder / name
        return self._publish(path, path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}"), parts)

    def _publish(self, path: Path, temporary: Path, parts: Iterable[bytes]) -> int:
        size = 0
        with reported(path):
            _make(path.parent)
            with replacing(path, temporary), _opened(temporary, _NEW) as fd:
                for part in parts:
                    write_all(fd, part)
                    size += len(part)
        return size

    def create(self, name: str, data: bytes) -> bool:
        """A link is made only where there is no file of that name; file systems without links get a plain rename."""
        path = self.folder / name
        temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY}")
        with reported(path):
            if path.exists():
                return False
            _make(path.parent)
            try:
                with naming(path, temporary):
                    with _opened(temporary, _NEW) as fd:
                        write_all(fd, data)
                        os.fsync(fd)
                    try:
                        os.link(temporary, path)
                    except FileExistsError:
                        return False
                    except OSError as error:
                        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
                            raise
                        os.replace(temporary, path)
                    sync(path.parent)
            finally:
                with contextlib.suppress(OSError):  # the first error counts
                    temporary.unlink(missing_ok=True)
        return True

    def remove(self, name: str) -> None:
        with reported(self.folder / name):
            (self.folder / name).unlink(missing_ok=True)

    def move(self, name: str, to: str) -> None:
        with reported(self.folder / name):
            _make((self.folder / to).parent)
            os.replace(self.folder / name, self.folder / to)
            sync((self.folder / to).parent)
            sync((self.folder / name).parent)

    @contextlib.contextmanager
    def lock(self, name: str, holder: str, *, wait: bool = False) -> Iterator[bool]:
        path = self.folder / name
        if self.is_blocked(name):
            raise CacheError(f"{path}: not a file, so nothing can lock it; remove it")
        with reported(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        _held.add(fd)
        try:
            with reported(path):
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
        finally:
            if fd in _held:  # else this is a child of the process that holds it
                _held.discard(fd)
                with contextlib.suppress(OSError):
                    fcntl.flock(fd, fcntl.LOCK_UN)
                os.close(fd)

    def is_locked(self, name: str) -> bool:
        """Opened for reading only: the file may lie on a read-only file system."""
        path = self.folder / name
        with reported(path), contextlib.suppress(FileNotFoundError):
            if path.is_file():
                with _opened(path, os.O_RDONLY) as fd:
                    try:
                        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    except BlockingIOError:
                        return True
        return False


def _make(folder: Path) -> None:
    """Makes a folder, and those that it lies in, so that they outlast a power cut."""
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags, 0o666)
    try:
        yield fd
    finally:
        os.close(fd)
