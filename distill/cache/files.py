"""Writing so that a kill or a power cut at any moment leaves the old state or the new one, never a part of either."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from distill.config.errors import CacheError
from distill.config.files import sync

TEMPORARY = ".tmp"
"""Suffix of files that are not published; a leftover may be removed by whoever would write it."""


@contextlib.contextmanager
def reported(path: Path) -> Iterator[None]:
    """Turns an OSError into a CacheError that names the file and the reason."""
    try:
        yield
    except OSError as error:
        raise CacheError(f"{path}: {error.strerror or error}") from error


def write_all(fd: int, data: bytes) -> None:
    """write(2) until everything is written; a file system may take less at a time."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def publish(path: Path, data: bytes) -> None:
    """Puts a file in place atomically and durably: temporary name, fsync, rename, fsync of the folder."""
    temporary = path.with_name(path.name + TEMPORARY)
    with reported(path):
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                write_all(fd, data)
                os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(temporary, path)
            sync(path.parent)
        except OSError:
            # A full disk is relieved of the part that was written; if even that fails, the first error counts.
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def locked(path: Path, holder: str, *, wait: bool) -> Iterator[None]:
    """Holds an exclusive flock on `path`; the kernel releases it when the process ends, however it ends.

    Raises:
        CacheError: `wait` is false and another live process holds it; `holder` says what for.
    """
    with reported(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            with reported(path):
                fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except CacheError as error:
            if isinstance(error.__cause__, BlockingIOError):
                pid = os.pread(fd, 32, 0).decode(errors="replace") or "unknown"
                raise CacheError(f"{path}: another live process (pid {pid}) holds {holder}") from error
            raise
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(fd)
