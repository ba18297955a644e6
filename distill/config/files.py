"""Files that are whole or not there: written beside, fsynced, renamed, and the folder fsynced."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LFS_CURE = "is a pointer of Git LFS, not the file that it stands for; fetch that one (git lfs pull)"


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what a clone without Git LFS has in place of a large one."""
    start = b"version https://git-lfs"
    with path.open("rb") as file:
        return file.read(len(start)) == start


def sync(path: Path) -> None:
    """Makes a closed file's bytes, or a folder's renames and removals, outlast a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on a clean exit it takes its place, on an exception nothing changes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replaces a file's text at one stroke."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
