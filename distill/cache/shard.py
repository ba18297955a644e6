"""One shard: to the bytes of its file, and memory mapped back. The format is that of `layout`."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import xxhash
from numpy.typing import NDArray

from distill.cache.files import reported
from distill.cache.layout import INDEX, PAYLOAD, RAGGED
from distill.cache.ledger import ShardRow
from distill.cache.seal import digest
from distill.config.errors import CacheError

Array = NDArray[Any]

_TYPES = {"I64": np.int64, "U64": np.uint64, "U32": np.uint32, "U8": np.uint8}


def build(sample_ids: Array, digests: Array, payload: dict[str, Array], metadata: dict[str, str]) -> tuple[bytes, int]:
    """The file of n samples and its `index_bytes`; `payload` is what `record.encode` returns."""
    ends = payload["ends"].astype(np.int64)
    for name, column_ends in zip(RAGGED, ends.T, strict=True):
        if len(payload[name]) != column_ends[-1] or len(payload[name]) >= 2**32:
            raise CacheError(f"{len(payload[name])} bytes of {name} in one shard; write fewer samples per shard")
    starts = np.concatenate([np.zeros((1, 3), np.int64), ends[:-1]])
    checks = np.array([_check(payload, i, starts[i], ends[i]) for i in range(len(ends))], np.uint64)
    columns = {"sample_ids": sample_ids.astype(np.int64), "digests": digests.astype(np.uint64), "checks": checks}
    data = safetensors.numpy.save(columns | payload, metadata=metadata)
    _, spans, index_bytes = _parse(data)
    # The library sorts by the width of a number, so that the index comes first: the ledger's digest relies on it.
    assert max(spans[name][1] for name in INDEX) == index_bytes == min(spans[name][0] for name in PAYLOAD)
    return data, index_bytes


class Shard:
    """A published shard, mapped; everything in front of the payload is verified when it is opened."""

    def __init__(self, path: Path, row: ShardRow):
        """Raises CacheError when the file is missing, of another size, or its index is damaged."""
        self.path, self.row = path, row
        with reported(path), path.open("rb") as file:
            size = file.seek(0, 2)
            if size != row.bytes:
                raise CacheError(f"{self.name} is damaged: {size} bytes, {row.bytes} in the ledger")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        view = memoryview(self._map)
        found = digest(view[: row.index_bytes])
        if found != row.index_digest:
            raise CacheError(f"{self.name} is damaged: index digest {found}, {row.index_digest} in the ledger")
        self.metadata, spans, _ = _parse(view)
        columns = {
            name: np.frombuffer(view[start:end], _TYPES[dtype]).reshape(shape)
            for name, (start, end, dtype, shape) in spans.items()
        }
        self.sample_ids, self.digests = columns["sample_ids"], columns["digests"]
        self._checks = columns["checks"].tolist()
        ends = columns["ends"].astype(np.int64)
        self._bounds = np.concatenate([np.zeros((1, 3), np.int64), ends]).tolist()
        self._payload = {name: columns[name] for name in PAYLOAD}

    @property
    def name(self) -> str:
        """File and the samples in it, for messages."""
        return f"{self.path} (samples {self.row.first_sample} to {self.row.last_sample})"

    def read(self, index: int) -> dict[str, Array]:
        """Payload of one sample, verified: each column's bytes of it.

        Raises:
            CacheError: they are not what was written; names file and sample.
        """
        pieces = _pieces(self._payload, index, self._bounds[index], self._bounds[index + 1])
        if _digest(pieces) != self._checks[index]:
            raise CacheError(f"{self.path} is damaged: sample {self.sample_ids[index]} does not verify")
        return pieces


def _parse(data: bytes | memoryview) -> tuple[dict[str, str], dict[str, tuple[int, int, str, list[int]]], int]:
    """Metadata; bytes, type and shape of each column; where the first payload column starts."""
    front = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:front]))
    metadata = header.pop("__metadata__")
    spans = {
        name: (front + h["data_offsets"][0], front + h["data_offsets"][1], h["dtype"], h["shape"])
        for name, h in header.items()
    }
    return metadata, spans, min(spans[name][0] for name in PAYLOAD)


def _pieces(payload: dict[str, Array], index: int, start: Any, end: Any) -> dict[str, Array]:
    pieces = {name: payload[name][index : index + 1] for name in ("orders", "label", "entropy", "rest")}
    for i, name in enumerate(RAGGED):
        pieces[name] = payload[name][start[i] : end[i]]
    return pieces


def _digest(pieces: dict[str, Array]) -> int:
    state = xxhash.xxh3_64()
    for name in PAYLOAD:
        state.update(pieces[name].data)
    return state.intdigest()


def _check(payload: dict[str, Array], index: int, start: Array, end: Array) -> int:
    return _digest(_pieces(payload, index, start, end))
