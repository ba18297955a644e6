"""Rows of JSON, Parquet and Arrow files, compressed or not."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from distill.config.errors import DataError
from distill.config.schema import FileFormat
from distill.data.formats import READ_ERRORS, Kind, compression_of, opened, problem
from distill.data.json_rows import JsonRows

ROWS = 256
"""Held at a time."""

Row = dict[str, Any]
"""Values by column."""


class _Part(NamedTuple):
    """Some rows of a file, one after the other."""

    names: list[str]
    """Of all columns, also of those that the rows leave out."""
    rows: list[tuple[int, Row]]
    """With their numbers."""
    share: float
    """Share of the file that is read with them."""


def rows(
    path: Path, kind: Kind, columns: dict[str, str], scratch: Path, progress: Callable[[float], None]
) -> Iterator[tuple[int, Row]]:
    """Number and values of row after row, read as a stream.

    A row's number is what an editor shows: its line or, where rows are not lines, its place in the file; from 1. A
    column that only some objects of a JSON file have is missing in the others.

    Args:
        columns: those that the file must have, each with the configuration's key for it.
        scratch: takes the decompressed bytes of a Parquet or Arrow file while it is read.
        progress: is called with the share of the file that was read.

    Raises:
        DataError: the file cannot be read as `kind`, or lacks a column.
    """
    try:
        if path.stat().st_size == 0:
            return
        parts = _json(path, kind) if kind.format is FileFormat.json else _tables(path, kind, list(columns), scratch)
        for first, part in enumerate(parts):
            for column, key in columns.items() if first == 0 else ():
                if part.names.count(column) != 1:
                    count = "more than one" if column in part.names else "no"
                    names = ", ".join(map(repr, part.names))
                    raise DataError(f"{path}: has {count} column {column!r} ({key}); it has {names}")
            progress(part.share)
            yield from part.rows
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {problem(error)}") from error


def _json(path: Path, kind: Kind) -> Iterator[_Part]:
    size = path.stat().st_size
    with path.open("rb") as packed, opened(packed, compression_of(path, kind)) as file:
        reader = JsonRows(getattr(file, "read1", file.read))  # read1 also gives what comes before a damaged place
        objects = iter(reader)
        while True:
            try:
                batch = list(islice(objects, ROWS))
            except (*READ_ERRORS, ValueError, RecursionError) as error:
                raise DataError(f"{path}: cannot be read as json: row {reader.row}: {problem(error)}") from error
            if not batch:
                return
            yield _Part(list(dict.fromkeys(name for _, row in batch for name in row)), batch, packed.tell() / size)


def _tables(path: Path, kind: Kind, columns: list[str], scratch: Path) -> Iterator[_Part]:
    compression, number = compression_of(path, kind), 0
    with ExitStack() as stack:
        try:
            plain = path
            if compression is not None:  # the readers need random access
                copy = stack.enter_context(tempfile.NamedTemporaryFile(dir=scratch))
                packed = stack.enter_context(path.open("rb"))
                shutil.copyfileobj(stack.enter_context(opened(packed, compression)), copy)
                copy.flush()
                plain = Path(copy.name)
            batches = _parquet(plain, columns) if kind.format is FileFormat.parquet else _arrow(plain)
            for names, batch, share in batches:
                wanted = [name for name in columns if names.count(name) == 1]
                for first in range(0, batch.num_rows, ROWS):
                    values = batch.slice(first, ROWS).select(wanted).to_pylist()
                    yield _Part(names, list(enumerate(values, number + 1)), share)
                    number += len(values)
        except READ_ERRORS as error:
            after = f" after row {number}" if number else ""
            raise DataError(f"{path}: cannot be read as {kind.format.value}{after}: {problem(error)}") from error


def _parquet(path: Path, columns: list[str]) -> Iterator[tuple[list[str], pa.RecordBatch, float]]:
    """Names of all columns, some rows, and the share of the file that is read with them."""
    with closing(pq.ParquetFile(str(path))) as file:
        names, done = file.schema_arrow.names, 0
        for batch in file.iter_batches(ROWS, columns=[name for name in columns if name in names]):
            done += batch.num_rows
            yield names, batch, done / max(file.metadata.num_rows, 1)


def _arrow(path: Path) -> Iterator[tuple[list[str], pa.RecordBatch, float]]:
    """The same of an Arrow file or stream."""
    with pa.OSFile(str(path)) as file:
        start = file.read(6)
        file.seek(0)
        if start.startswith(b"FEA1"):
            raise DataError(f"{path}: is Feather of version 1; write it anew (pyarrow.feather.write_feather)")
        whole = start == b"ARROW1"
        reader = pa.ipc.open_file(file) if whole else pa.ipc.open_stream(file)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if whole else reader
        for done, batch in enumerate(batches, 1):
            yield reader.schema.names, batch, done / reader.num_record_batches if whole else file.tell() / file.size()
