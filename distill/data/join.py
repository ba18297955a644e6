"""Tokens of a batch joined with their soft targets, by sample id and under the eyes of the digests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.cache import CacheReader, ReadResult, SoftTargets
from distill.config.errors import CacheError
from distill.config.paths import is_url
from distill.config.schema import OnMissing, TokenizerConfig
from distill.data.packed import PackedCorpus, PackedSamples
from distill.data.prefetch import Prefetch
from distill.data.tokenizer import TOKENIZER, Tokenizer, load
from distill.model.images import Images

__all__ = ["Batch", "Joiner", "Prefetch", "check_cache"]


@dataclass(frozen=True)
class Batch:
    """B samples of S tokens; T = B * S tokens, sample after sample."""

    ids_BS: Tensor
    """int64."""
    labels_BS: Tensor
    """int64: the next token; where not valid, any id of the vocabulary."""
    valid_BS: Tensor
    """bool: the label is of the same document and carries loss."""
    documents_BS: Tensor
    """int32: ordinal of the token's document within its sample."""
    sample_ids_B: NDArray[np.int64]
    corpus_B: NDArray[np.int64]
    """Which corpus a sample is of, in the Joiner's order."""
    digests_B: NDArray[np.uint64]
    targets: SoftTargets | None
    """None: no cache is read."""
    shard_loss_B: Tensor
    """float32 nats: the teacher's mean label loss on the sample's shard when captured; nan where not covered."""
    step_B: Tensor
    """int64: last teacher step of the sample's shard; -1 where not covered."""
    covered_B: Tensor
    """bool: the cache has targets of the sample."""
    images: Images | None = None
    """Tiles sample after sample; None: no sample has image tokens."""
    tile_tokens: int = 0
    """Tokens of a tile; 0: no corpus of the batch has images."""

    def rows(self, start: int, stop: int) -> Batch:
        """The samples from `start` to before `stop`, as views."""
        length = self.ids_BS.shape[1]
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        targets, images, tile_tokens = (parts.pop(name) for name in ("targets", "images", "tile_tokens"))
        if targets is not None:
            targets = SoftTargets(*(column[start * length : stop * length] for column in targets))
        if images is not None:
            images = _rows(images, start, stop, tile_tokens)
        parts = {name: part[start:stop] for name, part in parts.items()}
        return Batch(**parts, targets=targets, images=images, tile_tokens=tile_tokens)

    def to(self, device: torch.device | str) -> Batch:
        """The same with its tensors on `device`, but for documents_BS: the model plans with it on the CPU."""

        def moved(part: Any) -> Any:
            if isinstance(part, SoftTargets | Images):
                return type(part)(*map(moved, part))
            return part.to(device, non_blocking=True) if isinstance(part, Tensor) else part

        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{name: part if name == "documents_BS" else moved(part) for name, part in parts.items()})


def check_cache(
    reader: CacheReader, tokenizer: Tokenizer, corpus: PackedCorpus, vocab_size: int, *, student: bool = False
) -> None:
    """Refuses a cache of another tokenizer, vocabulary, packing length or corpus.

    A student's vocabulary may be the teacher's with rows after it, padding or added tokens: ids mean the same, and soft
    targets give the rows after it nothing. Its tokenizer may then be another, as far as the teacher's is at hand (above
    the cache, where its run left it) and all its ids are the same there. Samples in which added tokens occur are of
    another corpus, and never get targets of a teacher that had no such tokens.

    Args:
        vocab_size: of the model's head.
        student: the model reads targets; else it makes them, of exactly this vocabulary.

    Raises:
        CacheError: names every field that differs, with both values, and the ways out.
    """
    header = reader.header
    expected: dict[str, Any] = {"vocab_size": vocab_size, "tokenizer": tokenizer.digest, "corpus": corpus.digest}
    if student and header.vocab_size < vocab_size:
        del expected["vocab_size"]
    extended = student and header.tokenizer != tokenizer.digest and _is_extended(reader, tokenizer)
    if extended:
        del expected["tokenizer"]
    try:
        header.check(**expected, sample_tokens=corpus.sample_tokens, samples=len(corpus))
    except CacheError as error:
        raise CacheError("; ".join([str(error), *_ways_out(reader, expected, extended, student)])) from None


def _ways_out(reader: CacheReader, expected: dict[str, Any], extended: bool, student: bool) -> Iterator[str]:
    header = reader.header
    vocab_size = expected.get("vocab_size", header.vocab_size)
    if vocab_size != header.vocab_size:
        yield (
            f"targets fall on any of the teacher's {header.vocab_size} ids: set student.model.vocab_size to at least "
            "as many (rows added at the end)"
            if student
            else "a cache holds targets of one vocabulary: give this teacher a cache of its own"
        )
    if expected.get("tokenizer", header.tokenizer) != header.tokenizer:
        here = "" if is_url(reader.folder) else f", or put its {TOKENIZER} into {Path(reader.folder).absolute().parent}"
        yield (
            "ids may mean something else: set data.tokenizer.file to the teacher's tokenizer"
            + (f"{here}, if this one only adds to it" if student and here else "")
        )
    elif extended and expected["corpus"] != header.corpus:
        yield "the tokenizer adds tokens to the teacher's: where they occur in the text, its samples are others"


def _is_extended(reader: CacheReader, tokenizer: Tokenizer) -> bool:
    """The cache's tokenizer is found above it, and all its ids mean the same in the other."""
    if is_url(reader.folder):
        return False
    for folder in list(Path(reader.folder).absolute().parents)[:2]:  # a mixture's cache lies one folder deeper
        path = folder / TOKENIZER
        if path.exists():
            theirs = load(TokenizerConfig(bos=None, eos=None), path)
            if theirs.digest == reader.header.tokenizer:
                return tokenizer.extends(theirs)
    return False


class Joiner:
    """Makes batches.

    Args:
        corpora: in the order in which the stream numbers them.
        readers: the cache of each corpus; None: no soft targets.
        on_missing: what a sample without targets means: `hard`, not covered; `fail`, an error.
    """

    def __init__(self, corpora: list[PackedCorpus], readers: list[CacheReader] | None, on_missing: OnMissing):
        assert readers is None or len(readers) == len(corpora), "one cache for each corpus"
        assert len({corpus.sample_tokens for corpus in corpora}) <= 1, "one length of samples"
        self._corpora, self._readers, self._on_missing = corpora, readers, on_missing

    @property
    def views(self) -> list[dict[str, int]]:
        """What each cache's reader has taken in, in the order of corpora; empty without caches."""
        return [reader.view for reader in self._readers or []]

    def batch(self, corpus_B: NDArray[np.int64], sample_ids_B: NDArray[np.int64]) -> Batch:
        """The samples of these ids, each of its corpus, in this order.

        Raises:
            CacheError: tokens are not those that the teacher saw, or (on_missing=fail) a sample has no targets.
            DataError: a damaged corpus.
        """
        corpus_B, sample_ids_B = np.asarray(corpus_B, np.int64), np.asarray(sample_ids_B, np.int64)
        assert corpus_B.shape == sample_ids_B.shape and corpus_B.ndim == 1 and len(corpus_B), "one id per sample"
        # Samples are read corpus by corpus; `back` is where each came from in the batch.
        groups = [np.flatnonzero(corpus_B == c) for c in range(len(self._corpora))]
        parts = [(c, rows, sample_ids_B[rows]) for c, rows in enumerate(groups) if len(rows)]
        back = np.argsort(np.concatenate([rows for _, rows, _ in parts]))
        samples = [self._corpora[c].take(ids) for c, _, ids in parts]
        ids, documents, mask, digests = (np.concatenate(column)[back] for column in list(zip(*samples))[:4])
        tokens = torch.from_numpy(ids.astype(np.int64))
        targets, shard_loss_B, step_B = None, torch.full((len(back),), torch.nan), torch.full((len(back),), -1)
        if self._readers is not None:
            results = [self._read(c, wanted, part.digests) for (c, _, wanted), part in zip(parts, samples)]
            targets, shard_loss_B, step_B = _in_order(results, torch.from_numpy(back), self._corpora[0].sample_tokens)
        return Batch(
            ids_BS=tokens[:, :-1],
            labels_BS=tokens[:, 1:],
            valid_BS=torch.from_numpy(mask[:, 1:]),
            documents_BS=torch.from_numpy(documents[:, :-1]),
            sample_ids_B=sample_ids_B,
            corpus_B=corpus_B,
            digests_B=digests,
            targets=targets,
            shard_loss_B=shard_loss_B,
            step_B=step_B,
            covered_B=step_B >= 0,
            images=_images(samples, back),
            tile_tokens=max((part.images.tile_tokens for part in samples if part.images is not None), default=0),
        )

    def _read(self, corpus: int, sample_ids: NDArray[np.int64], digests: NDArray[np.uint64]) -> ReadResult:
        assert self._readers is not None
        reader = self._readers[corpus]
        result = reader.read(sample_ids, digests)
        missing = sample_ids[result.step_B.numpy() < 0]
        if len(missing) and self._on_missing is OnMissing.fail:
            raise CacheError(
                f"cache {reader.header.folder}: has no targets of sample {missing[0]} of corpus "
                f"{self._corpora[corpus].name!r}; cache.on_missing is fail (hard: train it on hard labels)"
            )
        return result


def _images(samples: list[PackedSamples], back_B: NDArray[np.int64]) -> Images | None:
    """The images of all corpora as those of one batch: row i is row `back_B[i]` of theirs, one after another."""
    tiles: list[NDArray[np.uint8]] = []
    patches: list[NDArray[np.int64]] = []
    tile_tokens = 0
    for part in samples:
        if part.images is None:
            tiles += [np.empty(0, np.uint8)] * len(part.ids)
            patches += [np.full(part.ids.shape[1] - 1, -1)] * len(part.ids)
        else:
            tiles += np.split(part.images.tiles_NCHW, part.images.counts_B.cumsum()[:-1])
            patches += [*part.images.patch_BS]
            tile_tokens = part.images.tile_tokens
    tiles = [tiles[b] for b in back_B]
    if not sum(map(len, tiles)):
        return None
    before_B1 = np.cumsum([0, *map(len, tiles[:-1])])[:, None] * tile_tokens
    patch_BS = np.array([patches[b] for b in back_B])
    return Images(
        torch.from_numpy(np.concatenate([part for part in tiles if len(part)])),
        torch.from_numpy(np.where(patch_BS < 0, -1, patch_BS + before_B1)),
    )


def _rows(images: Images, start: int, stop: int, tile_tokens: int) -> Images | None:
    """The images of rows `start` to before `stop`; every tile has a token in some row."""
    patch_BS = images.patch_BS[start:stop]
    if not (patch_BS >= 0).any():
        return None
    first, last = int(patch_BS[patch_BS >= 0].min()) // tile_tokens, int(patch_BS.max()) // tile_tokens
    return Images(images.tiles_NCHW[first : last + 1], torch.where(patch_BS < 0, -1, patch_BS - first * tile_tokens))


def _in_order(results: list[ReadResult], back_B: Tensor, length: int) -> ReadResult:
    """The results of all corpora as one of the batch: row i is row `back_B[i]` of theirs, one after another."""
    if len(results) == 1:  # one corpus is in the batch's order already
        return results[0]
    width = max(result.targets.ids_TK.shape[1] for result in results)
    back_T = (back_B[:, None] * length + torch.arange(length)).flatten()

    def column(name: str) -> Tensor:
        parts = [getattr(result.targets, name) for result in results]
        if name.endswith("_TK"):
            parts = [torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts]
        return torch.cat(parts)[back_T]

    return ReadResult(
        SoftTargets(*map(column, SoftTargets._fields)),
        torch.cat([result.shard_loss_B for result in results])[back_B],
        torch.cat([result.step_B for result in results])[back_B],
    )
