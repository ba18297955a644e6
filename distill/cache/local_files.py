"""Local files: read at a place, written so that a kill or a power cut leaves the old state or the new one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from distill.config.errors import CacheError
from distill.config.files import sync, write_all

TEMPORARY = ".tmp"
"""Suffix of files that are not published; a leftover may be removed by whoever would write it."""


@contextlib.contextmanager
def reported(path: Path | str) -> Iterator[None]:
    """Turns an OSError into a CacheError that names the file and the reason."""
    try:
        yield
    except OSError as error:
        raise CacheError(f"{path}: {error.strerror or error}") from error


def read_at(path: Path, start: int, size: int) -> bytes:
    """`size` bytes from `start`, fewer where the file ends.

    Not by mapping: a mapped file that another process cuts short kills its reader with SIGBUS.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        data = os.pread(fd, size, start)
        while 0 < len(data) < size and (more := os.pread(fd, size - len(data), start + len(data))):
            data += more
        return data
    finally:
        os.close(fd)


def publish(path: Path, data: bytes) -> None:
    """Puts a file in place atomically and durably: temporary name, fsync, rename, fsync of the folder."""
    temporary = path.with_name(path.name + TEMPORARY)
    with reported(path):
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
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
