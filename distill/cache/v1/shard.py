"""A shard of format 1, whose records are pieces of several columns. Read only."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from distill.cache.format import SHARDS
from distill.cache.ledger import Origin, ShardRow
from distill.cache.seal import digest
from distill.cache.shard import Columns
from distill.cache.store import Store
from distill.config.errors import CacheError

Array = NDArray[Any]

PAYLOAD = ("orders", "label", "entropy", "rest", "unary", "low", "codes")
RAGGED = ("unary", "low", "codes")
_TYPES = {"I64": np.int64, "U64": np.uint64, "U32": np.uint32, "U8": np.uint8}


def row(record: dict[str, Any], cache: str) -> dict[str, Any]:
    """A ledger row of format 1 as one of format 2."""
    record["cache"] = cache
    if "shard" in record:
        names = ("teacher", "first_step", "last_step", "tokens_seen", "loss")
        origin = {name: record[name] for name in names}
        origin |= {"samples": record["samples"], "tokens": record["tokens"], "seen_before": False}
        origin |= {"source": "capture", "flops_per_token": 0.0}
        record = {name: value for name, value in record.items() if name not in names}
        record |= {"origins": [origin], "source": "capture"}
    return record


class OldShard:
    """The index of a published shard, verified, and the pieces of its records on demand."""

    def __init__(self, store: Store, row: ShardRow):
        """Raises CacheError when the file is missing, of another size, or its index is damaged."""
        self.row, self._store, self._name = row, store, f"{SHARDS}/{row.shard}"
        self.path = store.path(self._name)
        size = store.size(self._name)
        if size != row.bytes:
            raise CacheError(f"{self.name} is damaged: {size} bytes, {row.bytes} in the ledger")
        if not 8 < row.index_bytes <= row.bytes:
            raise CacheError(f"{self.name} is damaged: an index of {row.index_bytes} bytes in a file of {row.bytes}")
        data = store.read_at(self._name, 0, row.index_bytes)
        if (found := digest(data)) != row.index_digest:
            raise CacheError(f"{self.name} is damaged: index digest {found}, {row.index_digest} in the ledger")
        try:
            front = 8 + int.from_bytes(data[:8], "little")
            header = json.loads(data[8:front])
            self._spans, self._widths = {}, {}
            for name in PAYLOAD:
                (start, end), shape = header[name]["data_offsets"], header[name]["shape"]
                width = shape[1] if len(shape) > 1 else 0
                whole = all(type(number) is int for number in (start, end, width))
                if not whole or not 0 <= start <= end <= row.bytes - front or width * row.samples > end - start:
                    raise ValueError(f"column {name} is not what it should be")
                self._spans[name], self._widths[name] = (front + start, front + end), width
            arrays = {}
            for name in ("sample_ids", "digests", "checks", "ends"):
                start, end = (front + offset for offset in header[name]["data_offsets"])
                arrays[name] = np.frombuffer(data[start:end], _TYPES[header[name]["dtype"]])
            ends = arrays["ends"].astype(np.int64).reshape(-1, 3)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise CacheError(f"{self.name} is damaged: {error!s:.300}") from error
        if any(len(arrays[name]) != row.samples for name in ("sample_ids", "digests", "checks")):
            raise CacheError(f"{self.name} is damaged: its columns do not fit the ledger")
        self._bounds = np.concatenate([np.zeros((1, 3), np.int64), ends])
        sizes = [self._spans[name][1] - self._spans[name][0] for name in RAGGED]
        if len(ends) != row.samples or (np.diff(self._bounds, axis=0) < 0).any() or (self._bounds > sizes).any():
            raise CacheError(f"{self.name} is damaged: records end where there is nothing")
        if (arrays["sample_ids"] < 0).any() or not row.samples:
            raise CacheError(f"{self.name} is damaged: its columns do not fit the ledger")
        self._checks = arrays["checks"]
        zeros = np.zeros(row.samples, np.int64)
        self.columns = Columns(arrays["sample_ids"], arrays["digests"], zeros + row.last_step, zeros, zeros)

    @property
    def name(self) -> str:
        """File and the samples in it, for messages."""
        return f"{self.path} (samples {self.row.first_sample} to {self.row.last_sample})"

    def origin(self, index: int) -> Origin:
        return self.row.origins[0]

    def record(self, index: int) -> dict[str, Array]:
        """The pieces of one record, by column; CacheError when they are not what was written."""
        pieces, state = {}, xxhash.xxh3_64()
        for name in PAYLOAD:
            start, end = self._spans[name]
            if name in RAGGED:
                left, right = self._bounds[index : index + 2, RAGGED.index(name)].tolist()
            else:
                left, right = index * self._widths[name], (index + 1) * self._widths[name]
            piece = self._store.read_at(self._name, start + left, min(start + right, end) - start - left)
            state.update(piece)
            pieces[name] = np.frombuffer(piece, np.uint8)
        if state.intdigest() != self._checks[index]:
            raise CacheError(f"{self.path} is damaged: sample {self.columns.sample_ids[index]} does not verify")
        return pieces
