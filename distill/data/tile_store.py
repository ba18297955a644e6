"""Tiles of a split's images on disk: an Arrow file beside the samples', memory-mapped, and written as a stream.

One row per tile, uint8 [3 * size * size], in the order of the stream, in record batches of equal length (the last may
be shorter). Image tokens of the stream are numbered too: token n belongs to tile n // tokens. So a sample that knows
how many image tokens come before it finds its tiles by division, also where it begins or ends within an image.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Tiles = NDArray[np.uint8]
"""[N, 3, size, size]"""

BATCH_BYTES = 1 << 22


@dataclass(frozen=True)
class TileFormat:
    """What the image tokens of a split are."""

    size: int
    """Pixels on a tile's side."""
    tokens: int
    """Tokens of a tile."""
    token_id: int


class SampleImages(NamedTuple):
    """The images of n samples."""

    tiles_NCHW: Tiles
    """Every tile that an input of a sample touches, sample after sample."""
    counts_B: Ints
    """[n] tiles of each sample."""
    patch_BS: Ints
    """[n, S] which token of the sample's own tiles (0: the first of its first) an input is; -1: none."""
    tile_tokens: int


class TileWriter:
    """Writes a file that is unfinished before `close`, and keeps the digests of tiles until they are forgotten."""

    def __init__(self, path: Path, tile_format: TileFormat):
        width = 3 * tile_format.size**2
        self._tokens = tile_format.tokens
        self._rows = max(1, BATCH_BYTES // width)
        self._schema = pa.schema([pa.field("tile", pa.list_(pa.uint8(), width))])
        self._writer = pa.ipc.new_file(str(path), self._schema)
        self._waiting: list[Tiles] = []
        self._tiles_waiting = self._count = 0
        self._digests: dict[int, bytes] = {}
        """By the tile's number."""

    def add(self, tiles_NCHW: Tiles) -> None:
        self._waiting.append(tiles_NCHW)
        self._tiles_waiting += len(tiles_NCHW)
        self._digests |= enumerate(map(digest, tiles_NCHW), self._count)
        self._count += len(tiles_NCHW)
        while self._tiles_waiting >= self._rows:
            self._write(self._rows)

    def seal(self, digests_B: NDArray[np.uint64], starts_B: Ints, counts_B: Ints) -> NDArray[np.uint64]:
        """The digests of samples, of which each has `counts_B` image tokens from number `starts_B` on."""
        first_B, stop_B = ranges(starts_B, counts_B, self._tokens)
        marks = (self._digests[n] for first, stop in zip(first_B, stop_B) for n in range(first, stop))
        return sealed(digests_B, starts_B % self._tokens, stop_B - first_B, marks)

    def forget(self, images: int) -> None:
        """Lets go of the digests of all tiles that end before image token number `images`."""
        first = images // self._tokens
        self._digests = {number: mark for number, mark in self._digests.items() if number >= first}

    def close(self) -> None:
        if self._tiles_waiting:
            self._write(self._tiles_waiting)
        self._writer.close()

    def _write(self, rows: int) -> None:
        tiles = np.concatenate(self._waiting)
        self._waiting, self._tiles_waiting = [tiles[rows:]], self._tiles_waiting - rows
        array = pa.FixedSizeListArray.from_arrays(pa.array(tiles[:rows].ravel()), tiles[0].size)
        self._writer.write_batch(pa.record_batch([array], schema=self._schema))


class TileFile:
    """Reads what a TileWriter wrote; safe in several threads. What it raises is the caller's to name."""

    def __init__(self, path: Path, tile_format: TileFormat):
        self._format = tile_format
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = self._reader.num_record_batches
        self._rows = self._reader.get_batch(0).num_rows if batches else 1
        self._count = (batches - 1) * self._rows + self._reader.get_batch(batches - 1).num_rows if batches else 0

    def __len__(self) -> int:
        return self._count

    def images(self, ids_BS: NDArray[np.int32], starts_B: Ints) -> SampleImages:
        """The images of samples whose inputs are `ids_BS`, with `starts_B` image tokens before each."""
        tokens = self._format.tokens
        here_BS = ids_BS == self._format.token_id
        first_B, stop_B = ranges(starts_B, here_BS.sum(1), tokens)
        numbers = [np.arange(first, stop) for first, stop in zip(first_B, stop_B)]
        order_BS = here_BS.cumsum(1) - 1 + (starts_B % tokens)[:, None]
        tiles_NCHW = self._take(np.concatenate(numbers or [starts_B]))
        return SampleImages(tiles_NCHW, stop_B - first_B, np.where(here_BS, order_BS, -1), tokens)

    def _take(self, numbers_N: Ints) -> Tiles:
        if len(numbers_N) and not 0 <= numbers_N.min() <= numbers_N.max() < self._count:
            raise IndexError(f"tile {numbers_N.max()} of {self._count}")
        tiles_NCHW = np.empty((len(numbers_N), 3, self._format.size, self._format.size), np.uint8)
        batch_N, row_N = np.divmod(numbers_N, self._rows)
        for batch in np.unique(batch_N):
            column = self._reader.get_batch(int(batch)).column(0)
            wanted = batch_N == batch
            flat = column.flatten().to_numpy()
            tiles_NCHW[wanted] = flat.reshape(len(column), *tiles_NCHW.shape[1:])[row_N[wanted]]
        return tiles_NCHW


def ranges(starts_B: Ints, counts_B: Ints, tokens: int) -> tuple[Ints, Ints]:
    """The tiles, from first [n] to before stop [n], of `counts_B` image tokens from number `starts_B` on."""
    first_B = starts_B // tokens
    return first_B, np.where(counts_B > 0, (starts_B + counts_B - 1) // tokens + 1, first_B)


def digest(tile_CHW: Tiles) -> bytes:
    return xxhash.xxh3_128_digest(tile_CHW.tobytes())


def sealed(
    digests_B: NDArray[np.uint64], offsets_B: Ints, counts_B: Ints, tile_digests: Iterable[bytes]
) -> NDArray[np.uint64]:
    """The digests of samples with `counts_B` tiles each, from those of their columns.

    Over the column digest, the place of the first image token within its tile, and the tiles, little-endian; a sample
    without tiles keeps the digest of its columns.
    """
    marks = iter(tile_digests)
    found = digests_B.copy()
    for b, (digest_, offset, count) in enumerate(zip(digests_B.tolist(), offsets_B.tolist(), counts_B.tolist())):
        if count:
            record = struct.pack("<QI", digest_, offset) + b"".join(itertools.islice(marks, count))
            found[b] = xxhash.xxh3_64_intdigest(record)
    return found
