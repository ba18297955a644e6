"""Rows of JSON, Parquet and Arrow files, compressed or not."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distill.config.errors import DataError
from distill.config.schema import FileFormat
from distill.data.formats import READ_ERRORS, Kind, compression_of, opened, reason
from distill.data.json_rows import JsonRows

ROWS = 256
"""Held at a time."""

Row = tuple[int, dict[str, Any]]
"""Its number, and values by column."""


def rows(
    path: Path, columns: list[str], keys: list[str], scratch: Path, kind: Kind, at: Callable[[float], None]
) -> Iterator[tuple[int, list[Any]]]:
    """The number and the values of `columns` of row after row, read as a stream.

    A row's number is what an editor shows: its line or, where rows are not lines, its place in the file; from 1. A
    column that only some objects of a JSON file have is None in the others.

    Args:
        keys: the configuration's name for each column.
        scratch: takes what a compressed Parquet or Arrow file holds while it is read.
        at: is called with the share of the file that was read.

    Raises:
        DataError: the file cannot be read as `kind`, or lacks a column.
    """
    try:
        if path.stat().st_size == 0:
            return
        checked = False
        for names, batch in _batches(path, columns, kind, scratch, at):
            for column, key in () if checked else zip(columns, keys):
                if names.count(column) != 1:
                    problem = "more than one column" if column in names else "no column"
                    raise DataError(f"{path}: has {problem} {column!r} ({key}); it has {', '.join(map(repr, names))}")
            checked = True
            for number, row in batch:
                yield number, [row.get(column) for column in columns]
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {reason(error)}") from error


def _batches(
    path: Path, columns: list[str], kind: Kind, scratch: Path, at: Callable[[float], None]
) -> Iterator[tuple[list[str], list[Row]]]:
    """Names of all columns, and some rows with at least those of `columns`."""
    if kind.format is FileFormat.json:
        yield from _json(path, kind, at)
        return
    compression, number = compression_of(path, kind), 0
    with ExitStack() as stack:
        try:
            plain = path
            if compression is not None:  # readers jump to and fro
                copy = stack.enter_context(tempfile.NamedTemporaryFile(dir=scratch))
                packed = stack.enter_context(path.open("rb"))
                shutil.copyfileobj(stack.enter_context(opened(packed, compression)), copy)
                copy.flush()
                plain = Path(copy.name)
            for names, batch, share in _tables(plain, columns, kind.format):
                at(share)
                yield names, list(enumerate(batch, number + 1))
                number += len(batch)
        except READ_ERRORS as error:
            after = f" after row {number}" if number else ""
            raise DataError(f"{path}: cannot be read as {kind.format.value}{after}: {reason(error)}") from error


def _json(path: Path, kind: Kind, at: Callable[[float], None]) -> Iterator[tuple[list[str], list[Row]]]:
    size = path.stat().st_size
    with path.open("rb") as packed, opened(packed, compression_of(path, kind)) as file:
        reader = JsonRows(getattr(file, "read1", file.read))  # what comes before a fault is read, too
        objects = iter(reader)
        while True:
            try:
                batch = list(islice(objects, ROWS))
            except (*READ_ERRORS, ValueError, RecursionError) as error:
                raise DataError(f"{path}: cannot be read as json: row {reader.row}: {reason(error)}") from error
            if not batch:
                return
            at(packed.tell() / size)
            yield list(dict.fromkeys(name for _, row in batch for name in row)), batch


def _tables(
    path: Path, columns: list[str], format: FileFormat
) -> Iterator[tuple[list[str], list[dict[str, Any]], float]]:
    """Names of all columns, some rows, and the share of the file that was read with them."""
    if format is FileFormat.parquet:
        with closing(pq.ParquetFile(str(path))) as file:
            names = file.schema_arrow.names
            wanted = [name for name in columns if name in names]
            done = 0
            for batch in file.iter_batches(ROWS, columns=wanted):
                done += batch.num_rows
                yield names, _columns(batch, wanted), done / max(file.metadata.num_rows, 1)
        return
    with pa.OSFile(str(path)) as file:
        start = file.read(6)
        file.seek(0)
        if start.startswith(b"FEA1"):
            raise DataError(f"{path}: is Feather of version 1; write it anew (pyarrow.feather.write_feather)")
        whole = start == b"ARROW1"
        reader = pa.ipc.open_file(file) if whole else pa.ipc.open_stream(file)
        names = reader.schema.names
        wanted = [name for name in columns if names.count(name) == 1]
        batches = map(reader.get_batch, range(reader.num_record_batches)) if whole else reader
        for done, batch in enumerate(batches, 1):
            share = done / reader.num_record_batches if whole else file.tell() / file.size()
            for first in range(0, batch.num_rows, ROWS):
                yield names, _columns(batch.slice(first, ROWS), wanted), share


def _columns(batch: pa.RecordBatch, wanted: list[str]) -> list[dict[str, Any]]:
    values = [batch.column(name).to_pylist() for name in wanted]
    return [dict(zip(wanted, row)) for row in zip(*values)] if wanted else [{} for _ in range(batch.num_rows)]
