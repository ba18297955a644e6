"""Rows of Parquet files one by one, with errors that name the file and the row."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from distill.config.errors import CacheError

DAMAGE = (OSError, ValueError, OverflowError, pa.ArrowException)
"""What pyarrow raises for files that are not what they should be; text that is not UTF-8 is a ValueError."""


class ParquetRow(NamedTuple):
    """One row; a column's value is a pyarrow array, since all columns that are read are lists."""

    where: str
    columns: dict[str, Any]


def files_of(paths: Sequence[str | Path], *patterns: str) -> list[Path]:
    """The files, and those of folders that fit the first pattern that any fits, in the order of numbers in their names.

    Raises:
        CacheError: a path is not there, or a folder has no such file.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = next(filter(None, ([*path.glob(pattern)] for pattern in patterns)), [])
            if not inside:
                raise CacheError(f"{path}: no {' or '.join(patterns)} in this folder")
            files += sorted(inside, key=lambda file: _numbers(file.name))
        elif path.exists():
            files.append(path)
        else:
            raise CacheError(f"{path}: no such file or folder")
    return files


def columns_of(path: Path) -> dict[str, pa.DataType]:
    """Names and types of a Parquet file's columns; CacheError when it is none."""
    try:
        schema = pq.read_schema(path)
    except DAMAGE as error:
        raise CacheError(f"{path}: not a Parquet file: {short(error)}") from error
    return dict(zip(schema.names, schema.types))


def demand(path: Path, types: dict[str, str]) -> None:
    """Raises CacheError when the file lacks a column of `types`, or one is not of its type there ("": any)."""
    columns = columns_of(path)
    if missing := [name for name in types if name not in columns]:
        raise CacheError(f"{path}: has no column {', '.join(missing)}; its columns are {', '.join(columns)}")
    for name, wanted in ((name, wanted) for name, wanted in types.items() if wanted):
        depth, kind = 0, columns[name]
        while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            depth, kind = depth + 1, kind.value_type
        is_number = pa.types.is_integer(kind) if wanted.endswith("integers") else pa.types.is_floating(kind)
        if depth != wanted.count("list") or not is_number:
            raise CacheError(f"{path}: column {name} is {columns[name]}; it must be a {wanted}")


def values(path: Path, names: Sequence[str], batch_rows: int) -> Iterator[ParquetRow]:
    """The rows of one file, a column's value as a pyarrow scalar; CacheError: not a Parquet file, or damaged."""
    number = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=batch_rows, columns=list(names)):
                for i in range(batch.num_rows):
                    yield ParquetRow(f"{path} row {number}", {name: batch.column(name)[i] for name in names})
                    number += 1
    except DAMAGE as error:
        raise CacheError(f"{path} is damaged near row {number}: {short(error)}") from error


def rows(path: Path, names: Sequence[str], batch_rows: int = 16) -> Iterator[ParquetRow]:
    """The rows of one file; CacheError as `values`, and where a value is missing."""
    for where, columns in values(path, names, batch_rows):
        for name, value in columns.items():
            if not value.is_valid or value.values.null_count:
                raise CacheError(f"{where}: column {name} has an empty value")
        yield ParquetRow(where, {name: value.values for name, value in columns.items()})


def flat(values: pa.Array) -> NDArray[Any]:
    """A list's numbers, at any depth."""
    while not pa.types.is_primitive(values.type):
        values = values.flatten()
    result: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return result


def lengths(values: pa.Array) -> NDArray[np.int64]:
    """Lengths of the lists in a list of lists."""
    result: NDArray[np.int64] = pc.list_value_length(values).to_numpy(zero_copy_only=False).astype(np.int64)
    return result


def _numbers(name: str) -> list[tuple[int, str]]:
    """data_2 comes before data_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def short(error: Exception) -> str:
    """The first line of a library's message."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
