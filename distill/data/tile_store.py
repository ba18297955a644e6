"""Tiles of a split's images on disk: an Arrow file beside that of the samples.

One row per tile, uint8 [3 * size * size], in the order of the stream. Image tokens of the stream are numbered too:
token n belongs to tile n // tokens. A sample's tiles follow by division from the count of image tokens before it, also
where the sample begins or ends within an image.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from distill.data.row_file import RowFile, RowWriter

Ints = NDArray[np.int64]
Digests = NDArray[np.uint64]
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

    def ranges(self, starts_B: Ints, counts_B: Ints) -> tuple[Ints, Ints]:
        """The tiles, from first [n] to before stop [n], of `counts_B` image tokens from number `starts_B` on."""
        first_B = starts_B // self.tokens
        return first_B, np.where(counts_B > 0, (starts_B + counts_B - 1) // self.tokens + 1, first_B)

    def seal(self, digests_B: Digests, starts_B: Ints, tile_digests: Iterable[Sequence[bytes]]) -> Digests:
        """The digests of samples with these tiles each, from those of their columns.

        Over the digest of the columns, the place of the first image token within its tile, and the digests of the
        tiles, little-endian; a sample without tiles keeps the digest of its columns.

        Args:
            starts_B: image tokens before each sample.
        """
        sealed_B = digests_B.copy()
        offsets_B = starts_B % self.tokens
        for b, (columns, offset, tiles) in enumerate(zip(digests_B.tolist(), offsets_B.tolist(), tile_digests)):
            if tiles:
                sealed_B[b] = xxhash.xxh3_64_intdigest(struct.pack("<QI", columns, offset) + b"".join(tiles))
        return sealed_B


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
    """Writes a file that is unfinished before `close`, and keeps the digests of tiles that samples may still need."""

    def __init__(self, path: Path, tile_format: TileFormat):
        width = 3 * tile_format.size**2
        self._format, self._rows = tile_format, max(1, BATCH_BYTES // width)
        self._writer = RowWriter(path, {"tile": pa.list_(pa.uint8(), width)})
        self._waiting: list[Tiles] = []
        self._tiles_waiting = self._count = 0
        self._digests: dict[int, bytes] = {}
        """By the tile's number."""
        self._images = 0
        """Image tokens of the samples that are sealed."""

    def add(self, tiles_NCHW: Tiles) -> None:
        """Appends the tiles of a document."""
        self._waiting.append(tiles_NCHW)
        self._tiles_waiting += len(tiles_NCHW)
        self._digests |= enumerate(map(_digest, tiles_NCHW), self._count)
        self._count += len(tiles_NCHW)
        while self._tiles_waiting >= self._rows:
            self._write(self._rows)

    def seal(self, digests_B: Digests, ids_BS: NDArray[np.int32]) -> tuple[Digests, Ints]:
        """The digests of the next samples, whose inputs are `ids_BS`, and the image tokens before each of them."""
        counts_B = (ids_BS == self._format.token_id).sum(1)
        starts_B = self._images + counts_B.cumsum() - counts_B
        self._images += int(counts_B.sum())
        firsts, stops = (part.tolist() for part in self._format.ranges(starts_B, counts_B))
        tiles = [[self._digests[n] for n in range(first, stop)] for first, stop in zip(firsts, stops)]
        for number in [number for number in self._digests if number < firsts[-1]]:
            del self._digests[number]
        return self._format.seal(digests_B, starts_B, tiles), starts_B

    def close(self) -> None:
        """Every tile is on disk when this returns."""
        if self._tiles_waiting:
            self._write(self._tiles_waiting)
        self._writer.close()

    def _write(self, rows: int) -> None:
        tiles = np.concatenate(self._waiting)
        self._waiting, self._tiles_waiting = [tiles[rows:]], self._tiles_waiting - rows
        self._writer.write({"tile": tiles[:rows].reshape(rows, -1)})


class TileFile:
    """Reads what a TileWriter wrote; safe in several threads. Its errors are those of RowFile."""

    def __init__(self, path: Path, tile_format: TileFormat):
        self._format, self._rows = tile_format, RowFile(path)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, digests_B: Digests, ids_BS: NDArray[np.int32], starts_B: Ints) -> tuple[Digests, SampleImages]:
        """The digests and the images of samples whose inputs are `ids_BS`, with `starts_B` image tokens before each."""
        size, tokens = self._format.size, self._format.tokens
        here_BS = ids_BS == self._format.token_id
        first_B, stop_B = self._format.ranges(starts_B, here_BS.sum(1))
        numbers = [np.arange(first, stop) for first, stop in zip(first_B, stop_B)]
        order_BS = here_BS.cumsum(1) - 1 + (starts_B % tokens)[:, None]
        tiles_N = self._rows.take(np.concatenate(numbers or [starts_B]))["tile"]
        tiles_NCHW = tiles_N.reshape(-1, 3, size, size)
        counts_B, digests = stop_B - first_B, map(_digest, tiles_NCHW)
        sealed_B = self._format.seal(digests_B, starts_B, (list(islice(digests, count)) for count in counts_B))
        return sealed_B, SampleImages(tiles_NCHW, counts_B, np.where(here_BS, order_BS, -1), tokens)


def _digest(tile_CHW: Tiles) -> bytes:
    return xxhash.xxh3_128_digest(tile_CHW.tobytes())
