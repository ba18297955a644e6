"""Shards, written and read in the format of docs/cache.md. No torch."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from distill.cache.format import shard_name
from distill.cache.header import CacheHeader
from distill.cache.seal import digest
from distill.cache.shard_header import COLUMNS, MAX_SAMPLES, WIDTH, ShardHeader, front_size, parse_front
from distill.cache.store import Store
from distill.config.errors import CacheError

Array = NDArray[Any]

_TYPES = {"I64": np.int64, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16}
_FIRST_READ = 1 << 16
"""Bytes that hold front and index of most shards, so that opening one is a single read."""


class Columns(NamedTuple):
    """The index of a shard's n samples, without what locates and verifies their records; all of length n."""

    sample_ids: NDArray[np.int64]
    digests: NDArray[np.uint64]
    """Digests of the tokens that the teacher predicted from."""
    steps: NDArray[np.int64]
    """The teacher's steps."""
    atoms: NDArray[np.int64]
    origins: NDArray[np.int64]
    """Index into the header's origins."""

    def take(self, places: Array) -> Columns:
        """The columns of the samples at these places."""
        return Columns(
            self.sample_ids[places], self.digests[places], self.steps[places], self.atoms[places], self.origins[places]
        )


def index_of(columns: Columns, records: Array, ends: Array) -> bytes:
    """The index of n samples, whose records lie in `records` one after the other up to `ends`.

    Raises:
        CacheError: more than the format holds in one shard.
    """
    if len(records) >= 2**32 or len(ends) > MAX_SAMPLES:
        raise CacheError(
            f"{len(records)} bytes of {len(ends)} records in one shard; allowed is less than {2**32} of {MAX_SAMPLES}"
        )
    for name in ("steps", "atoms"):
        numbers = getattr(columns, name)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < 2**32:
            raise CacheError(f"{name} of a sample from {numbers.min()} to {numbers.max()}; allowed is 0 to {2**32 - 1}")
    starts = np.concatenate([[0], ends])[:-1]
    view = records.data
    checks = [
        check(sample, token_digest, view[start:end])
        for sample, token_digest, start, end in zip(
            columns.sample_ids.tolist(), columns.digests.tolist(), starts.tolist(), ends.tolist(), strict=True
        )
    ]
    return index_bytes(columns, np.array(checks, np.uint64), ends)


def index_bytes(columns: Columns, checks: Array, ends: Array) -> bytes:
    """The index of records that are known by their checks."""
    index = columns._asdict() | {"checks": checks, "ends": ends}
    return b"".join(np.ascontiguousarray(index[name], _TYPES[dtype]).tobytes() for name, (dtype, _) in COLUMNS.items())


def verified(path: str, sample_id: int, token_digest: int, expected: int, record: bytes) -> bytes:
    """A record; CacheError, which names its file and sample, where its check is not the expected one."""
    if check(sample_id, token_digest, record) != expected:
        raise CacheError(f"{path} is damaged: sample {sample_id} does not verify")
    return record


def check(sample_id: int, token_digest: int, record: memoryview | bytes) -> int:
    """xxh3-64 that binds a record to its sample and to the sample's tokens."""
    state = xxhash.xxh3_64(record)
    state.update(sample_id.to_bytes(8, "little") + token_digest.to_bytes(8, "little"))
    return state.intdigest()


class Front(NamedTuple):
    """The verified header of a shard's file, and what was read with it."""

    header: ShardHeader
    size: int
    """Bytes in front of the index."""
    data: bytes
    """The start of the file, at least `size` bytes."""


def read_front(store: Store, cache: CacheHeader, writer: str, seq: int) -> Front:
    """The header of a shard's file.

    Raises:
        CacheError: as `front_of`, or it is another shard's file.
    """
    name = shard_name(writer, seq)
    front = front_of(store, cache, name)
    if (there := (front.header.writer, front.header.seq)) != (writer, seq):
        raise CacheError(
            f"{store.path(name)} is damaged: it is shard {there[1]} of writer {there[0]}, expected shard {seq} of "
            f"writer {writer}"
        )
    return front


def front_of(store: Store, cache: CacheHeader, name: str) -> Front:
    """The header of any file that is a shard.

    Raises:
        CacheError: the file is missing (the cause is a FileNotFoundError), damaged, or of another cache.
    """
    data = store.read_at(name, 0, _FIRST_READ)
    try:
        size = front_size(data)
        data = _at_least(store, name, data, size)
        header = parse_front(data[:size])
        if header.cache != cache.identity:
            raise ValueError(f"it belongs to another cache, {header.cache}; this one is {cache.identity}")
    except ValueError as error:
        raise CacheError(f"{store.path(name)} is damaged: {error!s:.300}") from error
    return Front(header, size, data)


def _at_least(store: Store, name: str, data: bytes, size: int) -> bytes:
    """The first `size` bytes of a file or more, fewer where it ends; data: what was read at first."""
    if len(data) >= size or len(data) < _FIRST_READ:
        return data
    return data + store.read_at(name, len(data), size - len(data))


class Shard:
    """The verified index of a published shard, and its records on demand."""

    def __init__(
        self, store: Store, cache: CacheHeader, writer: str, seq: int, front: Front | None = None, name: str = ""
    ):
        """front, name: of a file that has not the shard's own name.

        Raises CacheError when the file is missing, of another size, of another cache, or its index is damaged.
        """
        self._name = name or shard_name(writer, seq)
        self.path, self._store = store.path(self._name), store
        self.header, front_bytes, data = front or read_front(store, cache, writer, seq)
        header = self.header
        self.records_at = front_bytes + WIDTH * header.samples
        """Where the records begin in the file."""
        # One request more in a slow store, where the digests of the records find what is missing.
        if not store.slow and (actual := store.size(self._name)) != self.size:
            raise CacheError(f"{self.name} is damaged: {actual} bytes, {self.size} by its header")
        data = _at_least(store, self._name, data, self.records_at)
        index = data[front_bytes : self.records_at]
        if digest(index) != header.index:
            raise CacheError(f"{self.name} is damaged: index digest {digest(index)}, {header.index} in its header")
        arrays = columns_of(index, header.samples)
        self.bounds = np.concatenate([[0], arrays["ends"].astype(np.int64)])
        """Of the records, from the first one's start."""
        self.checks = arrays["checks"]
        self.columns = Columns(
            arrays["sample_ids"],
            arrays["digests"],
            *(arrays[name].astype(np.int64) for name in ("steps", "atoms", "origins")),
        )
        if not self._fits(cache):
            raise CacheError(f"{self.name} is damaged: its columns do not fit each other or its header")

    def _fits(self, cache: CacheHeader) -> bool:
        """Whether the columns agree with each other, with the shard's header and with the cache's."""
        header, ids, steps = self.header, self.columns.sample_ids, self.columns.steps
        bounds = (header.first_sample, header.last_sample)
        counts = np.bincount(self.columns.origins, minlength=len(header.origins)).tolist()
        return bool(
            bounds == ((ids.min(), ids.max()) if len(ids) else (-1, -1))
            and (not len(ids) or 0 <= bounds[0] <= bounds[1] < cache.samples)
            and counts == [origin.samples for origin in header.origins]
            and (not len(ids) or steps.max() == header.step)
            and self.columns.atoms.sum() == header.atoms
            and sum(origin.tokens for origin in header.origins) == header.tokens
            and (np.diff(self.bounds) >= 0).all()
            and self.bounds[-1] == header.records
        )

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.records_at + self.header.records

    @property
    def name(self) -> str:
        """File and the samples in it, for messages."""
        return f"{self.path} (samples {self.header.first_sample} to {self.header.last_sample})"

    def span(self, first: int, end: int) -> list[bytes]:
        """The records of samples number `first` to `end` - 1 of the shard, verified, in one read.

        Raises:
            CacheError: names file and sample of a record that is not what was written.
        """
        bounds = (self.bounds[first : end + 1] - self.bounds[first]).tolist()
        data = self._store.read_at(self._name, self.records_at + int(self.bounds[first]), bounds[-1])
        columns = (each[first:end].tolist() for each in (self.columns.sample_ids, self.columns.digests, self.checks))
        return [
            verified(self.path, sample, token_digest, expected, data[start:stop])
            for sample, token_digest, expected, (start, stop) in zip(*columns, pairwise(bounds), strict=True)
        ]


def columns_of(index: bytes, samples: int) -> dict[str, Array]:
    """The columns of an index, by name."""
    arrays, start = {}, 0
    for name, (dtype, width) in COLUMNS.items():
        arrays[name] = np.frombuffer(index, _TYPES[dtype], samples, start)
        start += width * samples
    return arrays
