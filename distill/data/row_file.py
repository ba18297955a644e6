"""Rows of numbers in an Arrow file, in record batches of equal length (the last may be shorter).

A row's batch and its place there are thus found by one division. A column holds one number a row, or a list of fixed
length.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distill.config.files import sync

Columns = dict[str, NDArray[Any]]
"""[n] or [n, length] by name."""


class RowWriter:
    """Writes a file that is unfinished before `close`; its batches are as they are handed in."""

    def __init__(self, path: Path, columns: dict[str, pa.DataType]):
        self._path, self._schema = path, pa.schema(list(columns.items()))
        self._writer = pa.ipc.new_file(str(path), self._schema)

    def write(self, columns: Columns) -> None:
        """One batch, with a row for each entry of the columns."""
        arrays = [
            pa.FixedSizeListArray.from_arrays(pa.array(column.ravel()), column.shape[1])
            if column.ndim == 2
            else pa.array(column)
            for column in (columns[name] for name in self._schema.names)
        ]
        self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))

    def close(self) -> None:
        """Every row is on disk when this returns."""
        self._writer.close()
        sync(self._path)


class RowFile:
    """Reads what a RowWriter wrote, through a memory map; safe in several threads.

    Raises:
        OSError, ValueError, LookupError, pa.ArrowException: the file is missing or damaged, here and later.
    """

    def __init__(self, path: Path):
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = self._reader.num_record_batches
        self._batch_rows = self._reader.get_batch(0).num_rows if batches else 1
        last = self._reader.get_batch(batches - 1).num_rows if batches else 0
        self._rows = max(0, batches - 1) * self._batch_rows + last

    def __len__(self) -> int:
        return self._rows

    def take(self, rows_N: NDArray[np.int64]) -> Columns:
        """Every column of these rows, in their order; a row may come twice."""
        if len(rows_N) and not 0 <= rows_N.min() <= rows_N.max() < len(self):
            raise IndexError(f"row {rows_N.max()} of {len(self)}")
        columns: Columns = {}
        for field in self._reader.schema:
            is_list = pa.types.is_fixed_size_list(field.type)
            shape = (len(rows_N), field.type.list_size) if is_list else (len(rows_N),)
            columns[field.name] = np.empty(shape, (field.type.value_type if is_list else field.type).to_pandas_dtype())
        batch_N, place_N = np.divmod(rows_N, self._batch_rows)
        for batch in np.unique(batch_N):
            record, wanted_N = self._reader.get_batch(int(batch)), batch_N == batch
            for name, column in columns.items():
                stored = record.column(name)
                values = (stored.flatten() if column.ndim == 2 else stored).to_numpy()
                column[wanted_N] = values.reshape(record.num_rows, *column.shape[1:])[place_N[wanted_N]]
        return columns
