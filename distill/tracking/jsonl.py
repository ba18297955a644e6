"""Append-only files of one JSON object a line: writing, reading what a killed run left, cutting back on resume."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from distill.config.files import naming, replacing, write_all

Row = dict[str, Any]


def read(path: Path) -> Iterator[Row]:
    """Rows of a file, in order; a missing file has none, and torn or foreign lines are passed over."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


class JsonLines:
    """Appends rows to a file. A row is with the operating system when `write` returns, on disk after `close`."""

    def __init__(self, path: Path, keep: Callable[[Row], bool] | None):
        """keep: which rows of an existing file stay (resume); None starts an empty file.

        Either way the new file is written beside the old one and renamed, so that a crash leaves one of the two.
        """
        with replacing(path) as beside, beside.open("w", encoding="utf-8") as file:
            if keep is not None:
                file.writelines(_line(row) for row in read(path) if keep(row))
        # Without a buffer, in which a full disk would leave a row for the interpreter's end to fail at once more.
        self._file = path.open("ab", buffering=0)
        self._path = path

    def write(self, row: Row) -> None:
        with naming(self._path):
            write_all(self._file.fileno(), _line(row).encode())

    def close(self) -> None:
        if not self._file.closed:
            with naming(self._path):
                os.fsync(self._file.fileno())
                self._file.close()


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
