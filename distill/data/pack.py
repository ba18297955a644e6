"""Packing: documents of a corpus -> [bos] + tokens + [eos] -> the fixed-length samples of both splits."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distill.config import stop, units
from distill.config.errors import DataError
from distill.config.files import sync
from distill.config.schema import ImageConfig, Source
from distill.config.terminal import Progress
from distill.data import image_tiles
from distill.data.gaps import Ranges
from distill.data.packed import SplitWriter
from distill.data.raw_corpus import Document, ImageFile, RawCorpus
from distill.data.tile_store import TileFormat, Tiles
from distill.data.tokenizer import ImageIds, Tokenizer

BATCH_CHARACTERS = 1 << 20
"""And bytes of image files, together."""
BATCH_DOCUMENTS = 1024
EXAMPLES = 5
"""Of text without a token, that a message shows."""


def pack(
    corpus: RawCorpus, tokenizer: Tokenizer, image_config: ImageConfig, sample_tokens: int, folder: Path, scratch: Path
) -> None:
    """Writes the splits `train` and, if there is one, `held_out` of a corpus into `folder`, in one pass over its text.

    What had to be left out of them is told on stderr and counted in `left_out.json`.

    Raises:
        DataError: a document or an image cannot be read, the tokenizer lacks the tokens of images, or a split is
            shorter than one sample.
    """
    image_ids, tile_format, filler_id = None, None, None
    if corpus.config.has_images:
        image_ids = tokenizer.image_ids()
        tile_format = TileFormat(image_config.tile_size, image_config.tile_tokens, image_ids.patch)
    if corpus.config.whole_documents:
        filler_id = tokenizer.eos_id or 0
    splits = {"train": False, "held_out": True} if corpus.config.has_held_out else {"train": False}
    writers = {
        held_out: SplitWriter(
            folder, split, sample_tokens, tokenizer.vocab_size, filler_id=filler_id, tile_format=tile_format
        )
        for split, held_out in splits.items()
    }
    tokens = {False: 0, True: 0}
    left_out = _LeftOut(corpus, tokenizer.name)
    progress, packed = Progress(units.tokens, count=None, transient=True), 0
    for batch in stop.checked(_batches(corpus.documents(scratch))):
        masked = any(document.ranges is not None for document in batch)
        texts = [document.text for document in batch]
        encoded = tokenizer.encode_batch(texts, offsets=masked)
        left_out.add(texts, tokenizer.unencodable(texts))
        for document, (ids, offsets) in zip(batch, encoded):
            loss = np.ones(len(ids), np.bool_)
            if document.ranges is not None:
                loss = carries_loss(document.ranges, np.array(offsets, np.int64).reshape(-1, 2))
            ids_n, loss_n = _framed(ids, loss, tokenizer)
            tiles_NCHW = None
            if image_ids is not None and document.images:
                ids_n, loss_n, tiles_NCHW = _with_images(ids_n, loss_n, document.images, image_ids, image_config)
            writers[document.held_out].add(ids_n, loss_n, tiles_NCHW)
            tokens[document.held_out] += len(ids_n)
        before, packed = packed, sum(tokens.values())
        share, total = (0.0, None) if corpus.share is None else (corpus.share, 1.0)
        progress.update(f"packing {corpus.name}", share, total, amount=packed - before, text=units.tokens(packed))
    progress.close()
    left_out.end(folder)
    for split, held_out in splits.items():
        if tokens[held_out] <= sample_tokens:
            cure = f"raise {corpus.key}.held_out, set it to 0, or name held_out_files" if held_out else "add text"
            raise DataError(
                f"{corpus.key}: the {split} split has {tokens[held_out]} tokens; one sample takes {sample_tokens + 1} "
                f"(data.sample_tokens is {sample_tokens}): {cure}"
            )
        writers[held_out].close()


def carries_loss(ranges: Ranges, offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which tokens share a character with one of `ranges`; offsets int64 [n, 2], result bool [n].

    A token that reaches over the edge of a range carries loss: better one token of the prompt than none of the answer.
    """
    length = max(int(offsets.max(initial=0)), *(end for _, end in ranges), 0)
    inside = np.zeros(length + 1, np.int64)
    for start, end in ranges:
        inside[start + 1 : end + 1] = 1
    before = inside.cumsum()  # characters that carry loss before a place
    return before[offsets[:, 1]] > before[offsets[:, 0]]


def _framed(
    ids: list[int], loss: NDArray[np.bool_], tokenizer: Tokenizer
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """bos carries no loss; eos does where the last token does: an answer's end is learned, a prompt's is not."""
    head = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    tail = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    last = bool(loss[-1]) if len(loss) else False
    framed = np.concatenate((np.zeros(len(head), np.bool_), loss, np.full(len(tail), last)))
    return np.array(head + ids + tail, np.int32), framed


def _with_images(
    ids: NDArray[np.int32],
    loss: NDArray[np.bool_],
    images: Sequence[ImageFile],
    image_ids: ImageIds,
    config: ImageConfig,
) -> tuple[NDArray[np.int32], NDArray[np.bool_], Tiles]:
    """The document with each image's tokens, which carry no loss, where its marker was; and all tiles in order."""
    markers = np.flatnonzero(ids == image_ids.image)
    if len(markers) != len(images):
        raise DataError(
            f"{images[0].where}: the tokenizer makes {len(markers)} image tokens of {len(images)} markers; "
            "in its file the marker must be a token that always stands alone"
        )
    parts: list[tuple[NDArray[np.int32], NDArray[np.bool_]]] = []
    tiles: list[Tiles] = []
    for image, last, here in zip(images, [-1, *markers], markers):
        parts.append((ids[last + 1 : here], loss[last + 1 : here]))
        tiles_NCHW, rows, columns = image_tiles.cut(image_tiles.decode(image.data, image.where), config)
        tokens = image_tiles.layout(rows, columns, config.tile_tokens, image_ids)
        parts.append((tokens, np.zeros(len(tokens), np.bool_)))
        tiles.append(tiles_NCHW)
    parts.append((ids[markers[-1] + 1 :], loss[markers[-1] + 1 :]))
    ids, loss = (np.concatenate(part) for part in zip(*parts))
    return ids, loss, np.concatenate(tiles)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Enough at a time to keep all cores of the tokenizer busy, and no more than memory likes, images included."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text) + sum(len(image.data) for image in document.images)
        if characters >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _LeftOut:
    """Counts what does not become tokens."""

    def __init__(self, corpus: RawCorpus, tokenizer: str):
        self._corpus, self._tokenizer = corpus, tokenizer
        self._documents = self._touched = self._characters = 0
        self._examples: dict[str, None] = {}

    def add(self, texts: list[str], unencodable: list[Ranges]) -> None:
        self._documents += len(texts)
        for text, ranges in zip(texts, unencodable):
            self._touched += bool(ranges)
            self._characters += sum(end - start for start, end in ranges)
            if len(self._examples) < EXAMPLES:
                self._examples |= dict.fromkeys(text[start:end] for start, end in ranges[:EXAMPLES])

    def end(self, folder: Path) -> None:
        if self._characters:
            examples = ", ".join(map(_shown, list(self._examples)[:EXAMPLES]))
            print(
                f"packing {self._corpus.name}: {self._characters} characters in {self._touched} of {self._documents} "
                f"documents are left out: {self._tokenizer} has no token for {examples} and no unknown token",
                file=sys.stderr,
            )
        if self._corpus.empty and self._corpus.config.source is Source.files:
            print(f"packing {self._corpus.name}: {self._corpus.empty} documents have no text", file=sys.stderr)
        path = folder / "left_out.json"
        counts = {
            "empty_documents": self._corpus.empty,
            "unencodable_characters": self._characters,
            "documents_with_unencodable_characters": self._touched,
        }
        path.write_text(json.dumps(counts, indent=1))
        sync(path)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 20 else text[:17] + "...")
