"""A cache as a Parquet file, for people who want to look with other tools.

One row a token, or one a sample with lists over its positions. What is not covered has no row, or an empty place in the
lists. Ids are of the tokenizer, probabilities as a student would be given them.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from distill.cache.reader import CacheReader, Sample
from distill.config.errors import CacheError
from distill.config.files import replacing
from distill.config.paths import home

GROUP_TOKENS = 1 << 17
"""Of a row group: what is in memory at one time."""


class Per(Enum):
    token = "token"
    sample = "sample"


_ORIGIN = {
    "sample_id": pa.int64(),
    "step": pa.int64(),
    "teacher": pa.string(),
    "source": pa.string(),
    "loss": pa.float64(),
}
"""`step`: the teacher's when it made the targets; `source`: capture, backfill or import; `loss`: the teacher's mean
label loss on the shard, nats."""
_TOKEN = {
    "ids": pa.list_(pa.int32()),
    "probs": pa.list_(pa.float32()),
    "label_logprob": pa.float32(),
    "entropy": pa.float32(),
}


def schema(per: Per) -> pa.Schema:
    """The columns."""
    if per is Per.token:
        return pa.schema(_ORIGIN | {"position": pa.int32()} | _TOKEN)
    lists = {name: pa.list_(kind) for name, kind in _TOKEN.items()}
    return pa.schema(_ORIGIN | {"covered": pa.list_(pa.bool_())} | lists)


def export(reader: CacheReader, path: str | Path, per: Per = Per.sample, *, progress: bool = True) -> dict[str, Any]:
    """Writes every sample of the reader's view to `path`, which appears whole or not at all.

    Returns: samples, rows, tokens (that have targets) and bytes of the file.

    Raises:
        CacheError: damaged records, or the file cannot be written.
    """
    path = Path(home(str(path)))
    if path.is_dir():
        raise CacheError(f"{path}: is a folder; name a file")
    total = int(reader.stats()["samples"])
    counts = {"samples": 0, "rows": 0, "tokens": 0}
    every = max(1, GROUP_TOKENS // reader.header.sample_tokens)
    about = {b"codistill.cache": reader.header.dump()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            replacing(path) as temporary,
            pq.ParquetWriter(temporary, schema(per).with_metadata(about), compression="zstd") as file,
            tqdm(total=total, unit=" samples", disable=None if progress else True) as bar,
        ):
            for samples in _groups(reader.samples(), every):
                table, tokens = _table(reader, samples, per)
                file.write_table(table, row_group_size=max(1, len(table)))
                counts["samples"] += len(samples)
                counts["rows"] += len(table)
                counts["tokens"] += tokens
                bar.update(len(samples))
    except (OSError, pa.ArrowException) as error:
        raise CacheError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
    return counts | {"bytes": path.stat().st_size}


def _groups(samples: Iterator[Sample], every: int) -> Iterator[list[Sample]]:
    while group := list(islice(samples, every)):
        yield group


def _table(reader: CacheReader, samples: list[Sample], per: Per) -> tuple[pa.Table, int]:
    decoded = reader.decode(samples)
    length = reader.header.sample_tokens
    counts_T = decoded.atoms.counts_T.numpy().astype(np.int64)
    valid_T = decoded.valid_T.numpy()
    offsets = np.concatenate([[0], np.cumsum(counts_T)]).astype(np.int32)
    token_columns = {
        "ids": pa.ListArray.from_arrays(offsets, pa.array(decoded.atoms.ids_N.numpy().astype(np.int32))),
        "probs": pa.ListArray.from_arrays(offsets, pa.array(reader.codec.probs(decoded.atoms).numpy())),
        "label_logprob": pa.array(decoded.label_logprob_T.numpy(), mask=~valid_T),
        "entropy": pa.array(decoded.entropy_T.numpy(), mask=~valid_T),
    }
    origin = {
        "sample_id": [sample.sample_id for sample in samples],
        "step": [sample.step for sample in samples],
        "teacher": [sample.origin.teacher for sample in samples],
        "source": [sample.origin.source for sample in samples],
        "loss": [sample.origin.loss for sample in samples],
    }
    columns = {name: pa.array(values, _ORIGIN[name]) for name, values in origin.items()}
    if per is Per.token:
        rows = pa.array(np.repeat(np.arange(len(samples)), length)[valid_T])
        columns = {name: column.take(rows) for name, column in columns.items()}
        columns["position"] = pa.array(np.tile(np.arange(length, dtype=np.int32), len(samples))[valid_T])
        keep = pa.array(np.flatnonzero(valid_T))
        columns |= {name: column.take(keep) for name, column in token_columns.items()}
    else:
        borders = np.arange(0, len(valid_T) + 1, length, dtype=np.int32)
        columns["covered"] = pa.ListArray.from_arrays(borders, pa.array(valid_T))
        columns |= {name: pa.ListArray.from_arrays(borders, column) for name, column in token_columns.items()}
    return pa.Table.from_pydict(columns, schema=schema(per)), int(valid_T.sum())
