"""Rows of jsonl, json, parquet and arrow files; the only file that knows `datasets`."""

from __future__ import annotations

import dataclasses
import glob
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill.config.errors import DataError

READERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
"""Which of the library's readers a suffix takes."""

_PLAIN = re.compile(r"[\w/. ~@%+=,-]*")

COMPRESSED = {".gz", ".zst", ".xz", ".bz2"}
ROWS = 256


def suffix(path: Path) -> str:
    """The suffix that says what a file holds: that of a compressed one is before the last."""
    suffixes = path.suffixes[-2:]
    if len(suffixes) == 2 and suffixes[1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def rows(path: Path, columns: list[str], keys: list[str], scratch: Path) -> Iterator[list[Any]]:
    """The values of `columns`, row after row, read as a stream: nothing is kept but what is under `scratch`.

    Args:
        keys: the configuration's name for each column.

    Raises:
        DataError: the file cannot be read as what its name says, or lacks a column.
    """
    try:
        if path.stat().st_size == 0:
            return
        for batch in _batches(path, scratch):
            for column, key in zip(columns, keys):
                if column not in batch:
                    raise DataError(f"{path}: has no column {column!r} ({key}); it has {', '.join(map(repr, batch))}")
            yield from map(list, zip(*(batch[column] for column in columns)))
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # readers raise errors of pyarrow, pandas, ujson and their own
        reason = str(error.__cause__ or error).splitlines() or [type(error).__name__]
        raise DataError(f"{path}: cannot be read as {READERS[suffix(path)]}: {reason[0]}") from error


def _batches(path: Path, scratch: Path) -> Iterator[dict[str, list[Any]]]:
    import datasets

    # A local file concerns nobody else: no report of its use, and our message is the only one.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    reader = READERS[suffix(path)]
    # Otherwise some columns' names would make it take rows for logs of chat agents.
    options = {"parse_agent_traces": False} if reader == "json" else {}
    with _named_plainly(path) as plain_path:
        stream = datasets.load_dataset(
            reader,
            data_files=[glob.escape(str(plain_path))],
            split="train",
            streaming=True,
            cache_dir=str(scratch),
            **options,
        )
        for column, feature in (stream.features or {}).items():
            if (plain := _undecoded(feature)) != feature:
                stream = stream.cast_column(column, plain)
        yield from stream.iter(batch_size=ROWS)


@contextmanager
def _named_plainly(path: Path) -> Iterator[Path]:
    """The path, or a link to the file: the library takes `::` in a name, and brackets or backslashes in that of a
    compressed file, for parts of a URL."""
    if _PLAIN.fullmatch(str(path)):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="codistill-") as folder:
        compression = path.suffix if path.suffix != suffix(path) else ""
        link = Path(folder, f"file{suffix(path)}{compression}")
        link.symlink_to(path.absolute())
        yield link


def _undecoded(feature: Any) -> Any:
    """The feature with every picture in it left as the bytes of its file."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, list):
        return [_undecoded(inner) for inner in feature]
    if hasattr(feature, "feature"):  # lists, as the library calls them
        return dataclasses.replace(feature, feature=_undecoded(feature.feature))
    return feature
