"""What a file holds, by its name, and the bytes of a file that may be compressed.

The name decides because JSON that is read as text would train a model on quotes and braces without an error.
"""

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
"""Suffixes of files that are one document each."""

COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2", ".xz": "xz"}
_MAGIC = {b"\x1f\x8b\x08": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\0": "xz"}
"""First bytes. Those of bz2 are letters, with which a text may begin."""

ALLOWED = f"{', '.join(TABLES)}, text ({', '.join(_PROSE.split()[:5])}, code), each with {', '.join(COMPRESSED)} behind"

READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)
"""What reading from `opened` raises where a file is damaged."""


class Kind(NamedTuple):
    """How a file is read; its `repr` is part of the identity of a corpus."""

    format: FileFormat
    compression: str | None
    """One of the values of COMPRESSED."""


def kind_of(name: Path, given: FileFormat | None = None) -> Kind | None:
    """The kind of a file by its suffixes in any case, or None; `given` is its format whatever the suffixes are."""
    suffixes = [suffix.lower() for suffix in name.suffixes]
    compression = COMPRESSED.get(suffixes[-1]) if suffixes else None
    if compression is not None:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    format = given or TABLES.get(suffix) or (FileFormat.text if suffix in TEXTS else None)
    return None if format is None else Kind(format, compression)


def compression_of(path: Path, kind: Kind) -> str | None:
    """The compression that the name gives or, where it gives none, that of the file's first bytes.

    Raises:
        DataError: the file is a pointer of Git LFS.
        OSError: it cannot be read.
    """
    if is_lfs_pointer(path):
        raise DataError(f"{path}: {LFS_CURE}")
    if kind.compression is not None:
        return kind.compression
    with path.open("rb") as file:
        start = file.read(6)
    return next((compression for magic, compression in _MAGIC.items() if start.startswith(magic)), None)


def opened(file: IO[bytes], compression: str | None) -> IO[bytes]:
    """A file's decompressed bytes, as a stream; errors in it are READ_ERRORS."""
    if compression == "gzip":
        return cast(IO[bytes], gzip.open(file))
    if compression == "bz2":
        return bz2.open(file)
    if compression == "xz":
        return lzma.open(file)
    if compression == "zstd":
        return cast(IO[bytes], pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd"))
    return file


def problem(error: Exception) -> str:
    """One line on what is wrong with a file."""
    text = (files.reason(error) or type(error).__name__).splitlines()[0]
    if "too much memory" in text:
        text += "; it was written with --long above 27: decompress it (zstd -d --long=31) or compress it anew"
    return text
