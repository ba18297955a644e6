"""Packed samples on disk: one Arrow file per split.

A split is the concatenation of its documents' tokens. Sample i is the S+1 tokens from i*S on, so that every position of
a sample has its label, and neighbors share one token. What is too short for a last sample is dropped. Columns, one row
per sample:

    ids        int32  [S+1]  token ids
    documents  int32  [S+1]  ordinal of each token's document, counted from 0 within the sample
    mask       uint8  [S+1]  1 where the token may be a label: it carries loss, and the token before it in the stream
                             belongs to the same document
    digest     uint64        xxh3-64 of the little-endian bytes of ids, documents and mask, in this order; sealed with
                             the tiles (see `tile_store`) where there are image tokens among the first S ids
    images     int64         only in corpora with images: image tokens of the split that come before the sample

Beside it `split`.json counts samples and packed documents (those in the dropped tail included) and has the digest of
the split, xxh3-128 of the samples' digests in order; `split`.counts.npy has the counts of ids.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from distill.cache import token_digests
from distill.config.errors import DataError
from distill.config.files import sync, write_text
from distill.data.row_file import Columns, RowFile, RowWriter
from distill.data.tile_store import SampleImages, TileFile, TileFormat, Tiles, TileWriter

COLUMNS: dict[str, np.dtype[Any]] = {"ids": np.dtype("<i4"), "documents": np.dtype("<i4"), "mask": np.dtype("u1")}
BATCH_TOKENS = 1 << 17


class PackedSamples(NamedTuple):
    """n samples; fields are the columns above."""

    ids: NDArray[np.int32]
    """[n, S+1]"""
    documents: NDArray[np.int32]
    """[n, S+1]"""
    mask: NDArray[np.bool_]
    """[n, S+1]"""
    digests: NDArray[np.uint64]
    """[n]"""
    images: SampleImages | None
    """None: the corpus has no images."""


def digests(columns: Columns) -> NDArray[np.uint64]:
    """The digest [n] of each row of `ids`, `documents` and `mask`, each [n, S+1]."""
    return token_digests(*(np.asarray(columns[name], dtype) for name, dtype in COLUMNS.items()))


class DocumentTokens(NamedTuple):
    """One document of n tokens, bos and eos included."""

    ids: NDArray[np.int32]
    loss: NDArray[np.bool_]
    """Which of them carry loss."""
    tiles_NCHW: Tiles | None = None
    """Of its images, in order."""


class _Tokens(NamedTuple):
    """n tokens of the split that are in no written sample yet."""

    ids: NDArray[np.int32]
    documents: NDArray[np.int64]
    """Ordinal of the document in the split."""
    mask: NDArray[np.uint8]


class SplitWriter:
    """Writes one split to `folder`/`split`.{arrow,counts.npy,json}, which are unfinished before `close`.

    Args:
        sample_tokens: S.
        vocab_size: ids are below it.
        filler_id: documents stay whole: one that would be cut by the end of a sample, and fits in one, begins the next;
            the room that is left is filled with this id, which carries no loss. None: documents follow each other, cut
            anywhere.
        tile_format: of a corpus with images, whose tiles go to `split`.tiles.arrow.

    Attributes:
        tokens: of the documents that were added.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        sample_tokens: int,
        vocab_size: int,
        filler_id: int | None,
        tile_format: TileFormat | None,
    ):
        self._folder, self._split, self._length = folder, split, sample_tokens
        self._filler_id, self._format = filler_id, tile_format
        self._rows = max(1, BATCH_TOKENS // (sample_tokens + 1))
        types: dict[str, pa.DataType] = {
            name: pa.list_(pa.from_numpy_dtype(dtype), sample_tokens + 1) for name, dtype in COLUMNS.items()
        }
        types["digest"] = pa.uint64()
        self._tiles = None
        if tile_format is not None:
            types["images"] = pa.int64()
            self._tiles = TileWriter(folder / f"{split}.tiles.arrow", tile_format)
        self._writer = RowWriter(folder / f"{split}.arrow", types)
        self._waiting: list[_Tokens] = []
        self._tokens_waiting = 0
        self._counts_V = np.zeros(vocab_size, np.int64)
        self._digest = xxhash.xxh3_128()
        self.tokens = self._samples = self._documents = self._ordinal = 0

    def add(self, document: DocumentTokens) -> None:
        """Appends a document to the split, and writes the samples that are complete."""
        ids, loss, tiles_NCHW = document
        place = self._tokens_waiting % self._length
        # The last of the S + 1 tokens of a sample is a label alone.
        if self._filler_id is not None and place and place + len(ids) > self._length + 1 >= len(ids):
            filler = np.full(self._length - place, self._filler_id, np.int32)
            self._append(filler, np.zeros(len(filler), np.uint8))
        mask = loss.astype(np.uint8)
        mask[:1] = 0  # the token before it belongs to another document
        self._append(ids, mask)
        self._documents += 1
        self.tokens += len(ids)
        if self._tiles is not None and tiles_NCHW is not None:
            self._tiles.add(tiles_NCHW)
        if self._tokens_waiting > self._rows * self._length:
            self._write((self._tokens_waiting - 1) // (self._rows * self._length) * self._rows)

    def _append(self, ids: NDArray[np.int32], mask: NDArray[np.uint8]) -> None:
        self._waiting.append(_Tokens(ids, np.full(len(ids), self._ordinal, np.int64), mask))
        self._ordinal += 1
        self._tokens_waiting += len(ids)

    def close(self) -> None:
        """Writes the rest; every file is on disk when this returns."""
        self._write(max(0, self._tokens_waiting - 1) // self._length)
        self._writer.close()
        if self._tiles is not None:
            self._tiles.close()
        record = {
            "sample_tokens": self._length,
            "samples": self._samples,
            "documents": self._documents,
            "digest": self._digest.hexdigest(),
        }
        if self._format is not None:
            record["tiles"] = asdict(self._format)
        counts_path = self._folder / f"{self._split}.counts.npy"
        np.save(counts_path, self._counts_V, allow_pickle=False)
        sync(counts_path)
        write_text(self._folder / f"{self._split}.json", json.dumps(record, indent=1, allow_nan=False))

    def _write(self, samples: int) -> None:
        """Writes so many samples, batch by batch."""
        if not samples:
            return
        ids, documents, mask = (np.concatenate(part) for part in zip(*self._waiting))
        for first in range(0, samples, self._rows):
            starts = np.arange(first, min(first + self._rows, samples)) * self._length
            places = starts[:, None] + np.arange(self._length + 1)
            within = documents[places]
            columns: Columns = {"ids": ids[places], "documents": within - within[:, :1], "mask": mask[places]}
            columns = {name: columns[name].astype(dtype) for name, dtype in COLUMNS.items()}
            columns["digest"] = digests(columns)
            if self._tiles is not None:
                columns["digest"], columns["images"] = self._tiles.seal(columns["digest"], columns["ids"][:, :-1])
            self._writer.write(columns)
            self._counts_V += np.bincount(columns["ids"][:, 1:].ravel(), minlength=len(self._counts_V))
            self._digest.update(columns["digest"].astype("<u8").tobytes())
        self._samples += samples
        done = samples * self._length
        self._waiting = [_Tokens(ids[done:], documents[done:], mask[done:])]
        self._tokens_waiting -= done


class PackedCorpus:
    """One finished split, read through a memory map; safe in several threads.

    Attributes:
        name: of the corpus, for messages.
        digest: hex identity of all the packed content, whatever files and machine it came from.
        sample_tokens: S.

    Raises:
        DataError: the files are missing or damaged.
    """

    def __init__(self, folder: Path, split: str, name: str):
        self.name, self._path = name, folder / f"{split}.arrow"
        try:
            record = json.loads((folder / f"{split}.json").read_bytes())
            tile_format = TileFormat(**record["tiles"]) if "tiles" in record else None
            self._samples: int = record["samples"]
            self.sample_tokens: int = record["sample_tokens"]
            self.digest: str = record["digest"]
            self._stored_counts_V = np.load(folder / f"{split}.counts.npy", allow_pickle=False)
            self._rows = RowFile(self._path)
            self._tiles = None if tile_format is None else TileFile(folder / f"{split}.tiles.arrow", tile_format)
        except (OSError, EOFError, ValueError, TypeError, LookupError, pa.ArrowException) as error:
            raise DataError(f"{self._path}: not a packed corpus: {error}; remove {folder} to pack it anew") from error

    def __len__(self) -> int:
        return self._samples

    @property
    def tiles_per_sample(self) -> float:
        """Tiles of images, mean over the samples; a tile that lies across two counts once."""
        return 0.0 if self._tiles is None else len(self._tiles) / max(self._samples, 1)

    def counts_V(self, vocab_size: int) -> NDArray[np.int64]:
        """How often each id stands where a label may stand, masked or not; int64 [vocab_size]."""
        stored = self._stored_counts_V
        assert vocab_size >= len(stored), f"{vocab_size} ids wanted, the corpus has {len(stored)}"
        return np.pad(stored, (0, vocab_size - len(stored)))

    def take(self, sample_ids: NDArray[np.int64]) -> PackedSamples:
        """The samples of these ids, in their order; an id may come twice.

        Raises:
            DataError: a sample's bytes are not those that were written.
        """
        ids_B = np.asarray(sample_ids, np.int64)
        assert ids_B.ndim == 1 and (not len(ids_B) or 0 <= ids_B.min() <= ids_B.max() < len(self)), ids_B
        images = None
        try:
            columns = self._rows.take(ids_B)
            digests_B = digests(columns)
            if self._tiles is not None:
                digests_B, images = self._tiles.read(digests_B, columns["ids"][:, :-1], columns["images"])
        except (OSError, ValueError, LookupError, pa.ArrowException) as error:
            raise DataError(f"{self._path}: is damaged: {error}; remove its folder to pack it anew") from error
        if (wrong := np.flatnonzero(digests_B != columns["digest"])).size:
            raise DataError(f"{self._path}: sample {ids_B[wrong[0]]} is damaged; remove its folder to pack it anew")
        return PackedSamples(columns["ids"], columns["documents"], columns["mask"].view(np.bool_), digests_B, images)
