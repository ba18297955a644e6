"""Files and folders that are whole or not there: written beside, fsynced, renamed, and the parent folder fsynced.

Every file has the mode that `open` gives it, 0666 less the umask.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LFS_CURE = "is a pointer of Git LFS, not the file that it stands for; fetch that one (git lfs pull)"


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what a clone without Git LFS has in place of a large one."""
    start = b"version https://git-lfs"
    with path.open("rb") as file:
        return file.read(len(start)) == start


def reason(error: Exception) -> str:
    """The system's own text of an error, without what pyarrow puts around it."""
    if not isinstance(error, OSError) or not error.errno:
        return str(error)
    text = error.strerror or ""
    return os.strerror(error.errno) if not text or "[errno" in text else text


def sync(path: Path) -> None:
    """Makes a closed file's bytes, or a folder's renames and removals, outlast a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def write_all(fd: int, data: bytes) -> None:
    """Writes all bytes; one call of write(2) may write only some of them."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


@contextmanager
def naming(path: Path | str, temporary: Path | None = None) -> Iterator[None]:
    """Puts `path` into an OSError that names no file, as those of writes and closes do, or names `temporary`."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, reason(error), str(path)) from error


def plain_mode(path: Path) -> None:
    """Gives a file that a library made for its owner alone the mode of any other file.

    A file made beside it shows that mode. The umask itself can be read only by setting it, in all threads at once.
    """
    probe = path.with_name(f".{path.name}.{os.getpid()}.mode")
    handle = os.open(probe, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        mode = stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)
        probe.unlink(missing_ok=True)
    with contextlib.suppress(PermissionError):  # a file system without modes
        path.chmod(mode)


@contextmanager
def replacing(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on a clean exit it takes its place, on an exception nothing changes.

    temporary: a path in the same folder; None: one that no other process uses.
    """
    temporary = temporary or path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path, temporary):
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error counts
            temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replaces a file's text at one stroke."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def publish_folder(temporary: Path, final: Path) -> None:
    """Renames a folder that is whole, once its files are on disk; OSError, and no change, where `final` has files."""
    for path in (*temporary.iterdir(), temporary):
        sync(path)
    temporary.rename(final)
    sync(final.parent)
