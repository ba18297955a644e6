"""A cache as a Parquet file, for people who want to look with other tools.

One row a token, or one a sample with lists over its positions. What is not covered has no row, or an empty place in the
lists. Ids are of the tokenizer, probabilities as a student gets them.
"""

from __future__ import annotations

import argparse
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from distill.config.errors import CacheError
from distill.config.files import replacing
from distill.config.paths import home
from distill.config.terminal import advancing
from distill.config.units import file_size, grouped
from distill.tools.common import add_folder

if TYPE_CHECKING:
    import pyarrow as pa

    from distill.cache.reader import CacheReader, Sample

GROUP_TOKENS = 1 << 17
"""Of a row group: what is in memory at one time."""


class Per(Enum):
    """What a row of the file is."""

    token = "token"
    sample = "sample"


class Exported(NamedTuple):
    """What was written."""

    samples: int
    rows: int
    tokens: int
    """That have targets."""
    bytes: int


def schema(per: Per) -> pa.Schema:
    """The columns.

    `step`: the teacher's when it made the targets; `source`: capture, backfill or import; `loss`: the teacher's mean
    label loss on the shard, nats.
    """
    import pyarrow as pa

    origin = {
        "sample_id": pa.int64(),
        "step": pa.int64(),
        "teacher": pa.string(),
        "source": pa.string(),
        "loss": pa.float64(),
    }
    token = {
        "ids": pa.list_(pa.int32()),
        "probs": pa.list_(pa.float32()),
        "label_logprob": pa.float32(),
        "entropy": pa.float32(),
    }
    if per is Per.token:
        return pa.schema(origin | {"position": pa.int32()} | token)
    return pa.schema(
        origin | {"covered": pa.list_(pa.bool_())} | {name: pa.list_(kind) for name, kind in token.items()}
    )


def export(reader: CacheReader, path: str | Path, per: Per = Per.sample) -> Exported:
    """Writes every sample of the reader's view to `path`, which appears whole or not at all.

    Raises:
        CacheError: damaged records, or the file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(home(str(path)))
    if path.is_dir():
        raise CacheError(f"{path}: is a folder; name a file")
    count = rows = tokens = 0
    at_a_time = max(1, GROUP_TOKENS // reader.header.sample_tokens)
    about = {b"codistill.cache": reader.header.dump()}
    samples = reader.samples()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            replacing(path) as temporary,
            pq.ParquetWriter(temporary, schema(per).with_metadata(about), compression="zstd") as file,
            advancing("export", int(reader.stats()["samples"]), grouped) as advance,
        ):
            while group := list(islice(samples, at_a_time)):
                table, valid = _table(reader, group, per)
                file.write_table(table, row_group_size=max(1, len(table)))
                count, rows, tokens = count + len(group), rows + len(table), tokens + valid
                advance(len(group))
    except (OSError, pa.ArrowException) as error:
        raise CacheError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
    return Exported(count, rows, tokens, path.stat().st_size)


def _table(reader: CacheReader, samples: list[Sample], per: Per) -> tuple[pa.Table, int]:
    """The rows of some samples, and how many tokens have targets."""
    import pyarrow as pa

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
    columns = {name: pa.array(values, schema(per).field(name).type) for name, values in origin.items()}
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folder(parser, "a cache; a path or a URL")
    parser.add_argument("file", metavar="FILE", type=home, help="the Parquet file")
    parser.add_argument(
        "--per", choices=[per.value for per in Per], default="sample", help="what a row is (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    from distill.cache.reader import CacheReader

    done = export(CacheReader(args.dir), args.file, Per(args.per))
    print(f"{args.file}: {grouped(done.rows)} rows, {grouped(done.tokens)} tokens, {file_size(done.bytes)}")
    return 0
