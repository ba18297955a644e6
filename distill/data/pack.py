"""Packing: documents of a corpus -> [bos] + tokens + [eos] -> the fixed-length samples of both splits."""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distill.config import stop, units
from distill.config.errors import DataError
from distill.config.files import write_text
from distill.config.schema import ImageConfig, Source
from distill.config.terminal import Progress
from distill.data import image_tiles
from distill.data.packed import DocumentTokens, SplitWriter
from distill.data.raw_corpus import Document, RawCorpus
from distill.data.tile_store import TileFormat
from distill.data.tokenizer import EncodedText, ImageIds, Ranges, Tokenizer

BATCH_CHARACTERS = 1 << 20
"""Of documents that are encoded together; bytes of image files count as well."""
BATCH_DOCUMENTS = 1024
EXAMPLES = 5
"""Of text without a token in a message."""


def pack(
    corpus: RawCorpus, tokenizer: Tokenizer, image_config: ImageConfig, sample_tokens: int, folder: Path, scratch: Path
) -> None:
    """Writes the splits `train` and, if there is one, `held_out` of a corpus into `folder`, in one pass over its text.

    Text that has to be left out is reported on stderr and counted in `left_out.json`.

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
    writers = {
        split: SplitWriter(folder, split, sample_tokens, tokenizer.vocab_size, filler_id, tile_format)
        for split in (["train", "held_out"] if corpus.config.has_held_out else ["train"])
    }
    left_out, packed = _LeftOut(corpus, tokenizer.name), 0
    progress = Progress(units.tokens, count=None, transient=True)
    for batch in stop.checked(_batches(corpus.documents(scratch))):
        texts = [document.text for document in batch]
        encoded = tokenizer.encode_batch(texts, offsets=any(document.ranges is not None for document in batch))
        left_out.add(texts, tokenizer.unencodable(texts))
        for document, text in zip(batch, encoded):
            tokens = _framed(document, text, tokenizer)
            if image_ids is not None and document.images:
                tokens = _with_images(tokens, document, image_ids, image_config)
            writers["held_out" if document.held_out else "train"].add(tokens)
        before, packed = packed, sum(writer.tokens for writer in writers.values())
        share, total = (0.0, None) if corpus.share is None else (corpus.share, 1.0)
        progress.update(f"packing {corpus.name}", share, total, amount=packed - before, text=units.tokens(packed))
    progress.close()
    left_out.report(folder)
    for split, writer in writers.items():
        if writer.tokens <= sample_tokens:
            held_out_cure = f"raise {corpus.key}.held_out, set it to 0, or name held_out_files"
            raise DataError(
                f"{corpus.key}: the {split} split has {writer.tokens} tokens; one sample takes {sample_tokens + 1} "
                f"(data.sample_tokens is {sample_tokens}): {held_out_cure if split == 'held_out' else 'add text'}"
            )
        writer.close()


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Enough at a time to keep all cores of the tokenizer busy, and a bounded amount of text and images."""
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


def _framed(document: Document, text: EncodedText, tokenizer: Tokenizer) -> DocumentTokens:
    """With bos, which carries no loss, and eos, which does where the last token does.

    The end of an answer is thus learned, and that of a prompt is not.
    """
    loss = np.ones(len(text.ids), np.bool_)
    if document.ranges is not None:
        loss = _carries_loss(document.ranges, np.array(text.ranges, np.int64).reshape(-1, 2))
    head = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    tail = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    last = bool(loss[-1]) if len(loss) else False
    framed = np.concatenate((np.zeros(len(head), np.bool_), loss, np.full(len(tail), last)))
    return DocumentTokens(np.array(head + text.ids + tail, np.int32), framed)


def _carries_loss(ranges: Ranges, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which tokens, of characters int64 [n, 2], share a character with one of `ranges`; bool [n].

    A token that reaches over the edge of a range carries loss: one token of the prompt is a smaller fault than a
    missing one of the answer.
    """
    length = max(int(tokens.max(initial=0)), *(end for _, end in ranges), 0)
    inside = np.zeros(length + 1, np.int64)
    for start, end in ranges:
        inside[start + 1 : end + 1] = 1
    before = inside.cumsum()  # characters that carry loss before a place
    return before[tokens[:, 1]] > before[tokens[:, 0]]


def _with_images(
    tokens: DocumentTokens, document: Document, image_ids: ImageIds, config: ImageConfig
) -> DocumentTokens:
    """With each image's tokens, which carry no loss, in place of its marker, and with the tiles of all images."""
    images, markers = document.images, np.flatnonzero(tokens.ids == image_ids.image)
    if len(markers) != len(images):
        raise DataError(
            f"{images[0].where}: the tokenizer makes {len(markers)} image tokens of {len(images)} markers; "
            "in its file the marker must be a token that always stands alone"
        )
    ids, loss, tiles = [], [], []
    texts = zip(np.split(tokens.ids, markers), np.split(tokens.loss, markers))
    for number, (text_ids, text_loss) in enumerate(texts):
        ids.append(text_ids[number > 0 :])  # all but the first begin with a marker
        loss.append(text_loss[number > 0 :])
        if number < len(images):
            cut = image_tiles.cut(image_tiles.decode(*images[number]), config)
            layout = image_tiles.layout(cut.rows, cut.columns, config.tile_tokens, image_ids)
            ids.append(layout)
            loss.append(np.zeros(len(layout), np.bool_))
            tiles.append(cut.tiles_NCHW)
    return DocumentTokens(np.concatenate(ids), np.concatenate(loss), np.concatenate(tiles))


class _LeftOut:
    """Counts text that does not become tokens."""

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

    def report(self, folder: Path) -> None:
        """Prints what was left out, and writes the counts to `left_out.json`."""
        name, empty = self._corpus.name, self._corpus.empty
        if self._characters:
            shown = (text if len(text) <= 20 else text[:17] + "..." for text in list(self._examples)[:EXAMPLES])
            print(
                f"packing {name}: left out {units.counted(self._characters, 'character')} in {self._touched:,} of "
                f"{units.counted(self._documents, 'document')}: {self._tokenizer} has no token for "
                f"{', '.join(map(repr, shown))} and no unknown token",
                file=sys.stderr,
            )
        if empty and self._corpus.config.source is Source.files:
            print(f"packing {name}: {units.counted(empty, 'document')} without text", file=sys.stderr)
        counts = {
            "empty_documents": empty,
            "unencodable_characters": self._characters,
            "documents_with_unencodable_characters": self._touched,
        }
        write_text(folder / "left_out.json", json.dumps(counts, indent=1))
