"""Shards, written and read in the format of docs/cache.md. No torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
import xxhash
from numpy.typing import NDArray

from distill.cache.ahead import NEAR
from distill.cache.fields import checked
from distill.cache.format import INDEX, RECORDS, SHARDS, row_of, shard_name
from distill.cache.ledger import Origin, ShardRow
from distill.cache.seal import digest
from distill.cache.store import Store
from distill.config.errors import CacheError

Array = NDArray[Any]

_TYPES = {"I64": np.int64, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16}
_COLUMNS = {
    "sample_ids": "I64", "digests": "U64", "checks": "U64", "ends": "U32", "steps": "U32", "atoms": "U32",
    "origins": "U16",
}  # fmt: skip
WIDTHS = {name: np.dtype(_TYPES[dtype]).itemsize for name, dtype in _COLUMNS.items()}
"""Bytes of a sample in each column of the index."""


class Columns(NamedTuple):
    """The index of a shard's n samples, without what locates and verifies their records; all of length n."""

    sample_ids: NDArray[np.int64]
    digests: NDArray[np.uint64]
    """Digests of the tokens that the teacher predicted from."""
    steps: NDArray[np.int64]
    """The teacher's steps."""
    atoms: NDArray[np.int64]
    origins: NDArray[np.int64]
    """Index into the row's origins."""

    def take(self, places: Array) -> Columns:
        """The columns of the samples at these places."""
        return Columns(
            self.sample_ids[places], self.digests[places], self.steps[places], self.atoms[places], self.origins[places]
        )


def build(columns: Columns, records: Array, ends: Array, metadata: dict[str, str]) -> bytes:
    """The file of n samples, whose records lie in `records` one after the other up to `ends`.

    Raises:
        CacheError: more than the format holds in one shard.
    """
    if len(records) >= 2**32 or len(set(columns.origins.tolist())) > 2**16:
        raise CacheError(f"{len(records)} bytes of records in one shard; allowed is less than {2**32}")
    for name in ("steps", "atoms"):
        numbers = getattr(columns, name)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < 2**32:
            raise CacheError(f"{name} of a sample from {numbers.min()} to {numbers.max()}; allowed is 0 to {2**32 - 1}")
    starts = np.concatenate([[0], ends[:-1]])
    view = records.data
    checks = [
        check(sample, token_digest, view[start:end])
        for sample, token_digest, start, end in zip(
            columns.sample_ids.tolist(), columns.digests.tolist(), starts.tolist(), ends.tolist(), strict=True
        )
    ]
    index = columns._asdict() | {"checks": np.array(checks, np.uint64), "ends": ends}
    arrays = {name: np.ascontiguousarray(index[name], _TYPES[dtype]) for name, dtype in _COLUMNS.items()}
    return _in_order(safetensors.numpy.save(arrays | {RECORDS: records}, metadata=metadata))


def _in_order(data: bytes) -> bytes:
    """The file with its metadata in order of names: the library's order is random, and equal work makes equal bytes."""
    front = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:front])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    assert len(text) <= front - 8, "a header that got longer"
    return b"".join([data[:8], text.ljust(front - 8), memoryview(data)[front:]])


def row_of_file(data: bytes, name: str, source: str | None = None) -> ShardRow:
    """The ledger row of a shard's file.

    name: of the file. source: what wrote it; None: as the origin of its records has it.

    Raises:
        CacheError: what is wrong with the file.
    """
    try:
        written = row_of(name)
        if written is None or shard_name(*written, digest(data)) != name:
            raise ValueError("its digest is not that of its name")
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        origins = tuple(checked(Origin, origin) for origin in json.loads(metadata["origins"]))
        spans = parse(data, len(data))
        index_bytes, end = spans[RECORDS]
        if end != len(data):  # the library sorts columns by the width of their numbers, so that the records come last
            raise ValueError("its records are not at its end")
        ids, atoms = (_column(data, spans, each) for each in ("sample_ids", "atoms"))
        return ShardRow(
            writer=written.writer,
            seq=written.seq,
            cache=metadata["cache"],
            shard=name,
            source=source or origins[0].source,
            samples=len(ids),
            first_sample=int(ids.min()),
            last_sample=int(ids.max()),
            tokens=sum(origin.tokens for origin in origins),
            atoms=int(atoms.sum()),
            bytes=len(data),
            file_digest=digest(data),
            index_bytes=index_bytes,
            index_digest=digest(memoryview(data)[:index_bytes]),
            origins=origins,
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise CacheError(str(error)) from error


def check(sample_id: int, token_digest: int, record: memoryview | bytes) -> int:
    """xxh3-64 that binds a record to its sample and to the sample's tokens."""
    state = xxhash.xxh3_64(record)
    state.update(sample_id.to_bytes(8, "little") + token_digest.to_bytes(8, "little"))
    return state.intdigest()


class Shard:
    """The index of a published shard, verified, and its records on demand."""

    def __init__(self, store: Store, row: ShardRow, *, whole: bool = True, sound: bool = True):
        """Raises CacheError when the file is missing, of another size, or its index is damaged.

        whole: check the size of the file. sound: check the digest of the index; without it only the ids and token
        digests of records that verify can be trusted.
        """
        self.row, self._store, self._name = row, store, f"{SHARDS}/{row.shard}"
        self.path = store.path(self._name)
        # One request more in a slow store, where the digests of the records find what is missing.
        if whole and not store.slow:
            with self._there():
                size = store.size(self._name)
            if size != row.bytes:
                raise CacheError(f"{self.name} is damaged: {size} bytes, {row.bytes} in the ledger")
        if not 8 < row.index_bytes <= row.bytes:
            raise CacheError(f"{self.name} is damaged: an index of {row.index_bytes} bytes in a file of {row.bytes}")
        with self._there():
            data = store.read_at(self._name, 0, row.index_bytes)
        if sound and (actual := digest(data)) != row.index_digest:
            raise CacheError(f"{self.name} is damaged: index digest {actual}, {row.index_digest} in the ledger")
        try:
            spans = parse(data, row.bytes)
            arrays = {name: _column(data, spans, name) for name in INDEX}
            ends = arrays["ends"].astype(np.int64)
            self.bounds = row.index_bytes + np.concatenate([[0], ends])
            wrong = (
                any(len(array) != row.samples for array in arrays.values())
                or (np.diff(self.bounds) < 0).any()
                or self.bounds[-1] != row.bytes
                or spans[RECORDS] != (row.index_bytes, row.bytes)
                or (sound and not self._fits(arrays))
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CacheError(f"{self.name} is damaged: {error!s:.300}") from error
        if wrong:
            raise CacheError(f"{self.name} is damaged: its columns do not fit each other or the ledger")
        self._checks = arrays["checks"]
        self.columns = Columns(
            arrays["sample_ids"],
            arrays["digests"],
            *(arrays[name].astype(np.int64) for name in ("steps", "atoms", "origins")),
        )

    def _fits(self, arrays: dict[str, Array]) -> bool:
        """Whether the columns agree with the ledger's row."""
        row, ids = self.row, arrays["sample_ids"]
        return bool(
            (arrays["origins"] < len(row.origins)).all()
            and (ids.min(), ids.max()) == (row.first_sample, row.last_sample)
            and ids.min() >= 0
            and arrays["atoms"].sum() == row.atoms
        )

    @property
    def name(self) -> str:
        """File and the samples in it, for messages."""
        return f"{self.path} (samples {self.row.first_sample} to {self.row.last_sample})"

    def origin(self, index: int) -> Origin:
        return self.row.origins[self.columns.origins[index]]

    def span(self, first: int, end: int) -> list[bytes]:
        """The records of samples number `first` to `end` - 1 of the shard, verified, in one read.

        Raises:
            CacheError: names file and sample of a record that is not what was written.
        """
        data = self.read(first, end)
        bounds = (self.bounds[first : end + 1] - self.bounds[first]).tolist()
        return [self.verified(first + i, data[bounds[i] : bounds[i + 1]]) for i in range(end - first)]

    def read(self, first: int, end: int) -> bytes:
        """The bytes of samples number `first` to `end` - 1, not verified."""
        start, stop = int(self.bounds[first]), int(self.bounds[end])
        with self._there():
            return self._store.read_at(self._name, start, stop - start)

    def records(self, indexes: Sequence[int] | Array) -> list[bytes]:
        """The records of some samples, verified; neighbors are read at once. CacheError as `span`."""
        records: dict[int, bytes] = {}
        wanted = np.unique(indexes)
        gaps = self.bounds[wanted[1:]] - self.bounds[wanted[:-1] + 1]
        for run in np.split(wanted, np.flatnonzero(gaps > (NEAR if self._store.slow else 0)) + 1):
            first = int(self.bounds[run[0]])
            with self._there():
                data = self._store.read_ahead(self._name, first, int(self.bounds[run[-1] + 1]) - first)
            for index in run.tolist():
                start, end = (self.bounds[index : index + 2] - first).tolist()
                records[index] = self.verified(index, data[start:end])
        return [records[index] for index in indexes]

    @contextlib.contextmanager
    def _there(self) -> Iterator[None]:
        """Adds the likely cause to the error for a missing file: it was lost, or retired and then purged."""
        try:
            yield
        except CacheError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise CacheError(
                    f"{error}; if `compact --purge` has removed it, refresh the reader: a view from before the "
                    "compaction cannot be read any more"
                ) from error.__cause__
            raise

    def verified(self, index: int, data: bytes) -> bytes:
        """The record of one sample; CacheError when its bytes do not have their digest."""
        sample, token_digest = int(self.columns.sample_ids[index]), int(self.columns.digests[index])
        if check(sample, token_digest, data) != self._checks[index]:
            raise CacheError(f"{self.path} is damaged: sample {sample} does not verify")
        return data


def parse(data: bytes, size: int) -> dict[str, tuple[int, int]]:
    """Where each column lies in a file of `size` bytes that begins with `data`; ValueError if that cannot be."""
    front = 8 + int.from_bytes(data[:8], "little")
    if not 8 < front <= len(data):
        raise ValueError(f"a header of {front - 8} bytes")
    header = json.loads(data[8:front])
    spans = {}
    for name, dtype in (_COLUMNS | {RECORDS: "U8"}).items():
        start, end = header[name]["data_offsets"]
        if header[name]["dtype"] != dtype or not 0 <= start <= end <= size - front:
            raise ValueError(f"column {name} is not what it should be")
        spans[name] = (front + start, front + end)
    return spans


def _column(data: bytes, spans: dict[str, tuple[int, int]], name: str) -> Array:
    return np.frombuffer(data[slice(*spans[name])], _TYPES[_COLUMNS[name]])
