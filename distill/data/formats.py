"""What a file's name says that it holds, and the bytes of a file that may be compressed.

A name must say it: JSON read as text would train a model on quotes and braces, and nobody would be told.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from pathlib import Path
from typing import IO, NamedTuple, cast

import pyarrow as pa

from distill.config import files
from distill.config.errors import DataError
from distill.config.files import LFS_CURE, is_lfs_pointer
from distill.config.schema import FileFormat

TABLES = {
    ".jsonl": FileFormat.json,
    ".ndjson": FileFormat.json,
    ".json": FileFormat.json,
    ".parquet": FileFormat.parquet,
    ".arrow": FileFormat.arrow,
    ".feather": FileFormat.arrow,
}
_PROSE = ".txt .text .md .markdown .rst .tex .org .adoc .html .htm .xml"
_SOURCE = """
    .py .pyi .c .h .cc .cpp .cxx .hh .hpp .cu .cuh .rs .go .java .kt .scala .swift .js .jsx .ts .tsx .css .rb .php .pl
    .lua .r .jl .hs .ml .ex .erl .clj .lisp .f90 .sh .bash .sql .asm .s .cmake .toml .ini .cfg .yaml .yml"""
TEXTS = frozenset((_PROSE + _SOURCE).split())
"""One document a file."""

COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2", ".xz": "xz"}
_MAGIC = {b"\x1f\x8b\x08": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\0": "xz"}
"""First bytes. Those of bz2 are letters, with which a text may begin."""

ALLOWED = f"{', '.join(TABLES)}, text ({', '.join(_PROSE.split()[:5])}, code), each with {', '.join(COMPRESSED)} behind"

READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)
"""What reading from `opened` raises where a file is damaged."""


class Kind(NamedTuple):
    """How a file is read."""

    format: FileFormat
    compression: str | None
    """By its name: one of the values of COMPRESSED."""


def kind_of(name: Path, given: FileFormat | None = None) -> Kind | None:
    """What a name says, in any case; None: nothing. `given` is a format that counts whatever the name says of it."""
    suffixes = [suffix.lower() for suffix in name.suffixes]
    compression = COMPRESSED.get(suffixes[-1]) if suffixes else None
    if compression is not None:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    found = given or TABLES.get(suffix) or (FileFormat.text if suffix in TEXTS else None)
    return None if found is None else Kind(found, compression)


def compression_of(path: Path, kind: Kind) -> str | None:
    """One of the values of COMPRESSED; where the name says nothing, first bytes that no other file has.

    Raises:
        DataError: the file stands for another one.
        OSError: it cannot be read.
    """
    if is_lfs_pointer(path):
        raise DataError(f"{path}: {LFS_CURE}")
    if kind.compression is not None:
        return kind.compression
    with path.open("rb") as file:
        start = file.read(6)
    return next((found for magic, found in _MAGIC.items() if start.startswith(magic)), None)


def opened(file: IO[bytes], compression: str | None) -> IO[bytes]:
    """A file's bytes as they were before compression, as a stream; errors in it are READ_ERRORS."""
    if compression == "gzip":
        return cast(IO[bytes], gzip.open(file))
    if compression == "bz2":
        return bz2.open(file)
    if compression == "xz":
        return lzma.open(file)
    if compression == "zstd":
        return cast(IO[bytes], pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd"))
    return file


def reason(error: Exception) -> str:
    """One line on what went wrong with a file."""
    text = (files.reason(error) or type(error).__name__).splitlines()[0]
    if "too much memory" in text:
        text += "; it was written with --long above 27: decompress it (zstd -d --long=31) or compress it anew"
    return text
