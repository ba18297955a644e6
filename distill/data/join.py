"""Joins tokens with their soft targets, by sample id and with a check of the digests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.cache import CacheReader, ReadResult, SoftTargets
from distill.config.errors import CacheError
from distill.config.paths import is_url
from distill.config.schema import OnMissing, TokenizerConfig
from distill.data.packed import PackedCorpus, PackedSamples
from distill.data.teacher_levels import Levels, TeacherLevels
from distill.data.tokenizer import TOKENIZER, Tokenizer, load_tokenizer
from distill.model.images import Images
from distill.model.transfer import pinned, sent


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
    """The corpus of each sample, by its number in the Joiner."""
    digests_B: NDArray[np.uint64]
    targets: SoftTargets | None
    """None: no cache is read."""
    shard_loss_B: Tensor
    """float32 nats: the teacher's mean label loss on the sample's shard when captured; nan where not covered."""
    step_B: Tensor
    """int64: the teacher's step when it made the targets; -1 where not covered."""
    level_B: Tensor
    """float32 nats: that teacher's loss at that step on a smooth curve over its training; nan: not known."""
    end_B: Tensor
    """float32 nats: where the best teacher of the sample's cache ends on its curve; nan: not known."""
    par_B: Tensor
    """float32 nats: where it was after as many samples as the student has had; inf: not known, nan: no targets."""
    images: Images | None = None
    """Tiles sample after sample; None: no sample has image tokens."""
    tile_tokens: int = 0
    """Tokens of a tile; 0: no corpus of the batch has images."""
    teacher_TE: Tensor | None = None
    """Normed hidden states of a live teacher; None: there is none."""

    def rows(self, start: int, stop: int) -> Batch:
        """The samples from `start` to before `stop`, as views."""
        length, targets, images = self.ids_BS.shape[1], self.targets, self.images
        if targets is not None:
            targets = SoftTargets(*(column[start * length : stop * length] for column in targets))
        if images is not None:
            images = _rows(images, start, stop, self.tile_tokens)
        teacher_TE = None if self.teacher_TE is None else self.teacher_TE[start * length : stop * length]
        others = [f.name for f in fields(self) if f.name not in ("targets", "teacher_TE", "images", "tile_tokens")]
        parts = {name: getattr(self, name)[start:stop] for name in others}
        return replace(self, **parts, targets=targets, teacher_TE=teacher_TE, images=images)

    def pinned(self, device: torch.device) -> Batch:
        """The same in memory from which `to` copies at once (`distill.model.transfer`)."""
        return self._moved(lambda part: pinned(part, device))

    def to(self, device: torch.device) -> Batch:
        """The same with its tensors on `device`, but for documents_BS, with which the model plans on the CPU."""
        return self._moved(lambda part: sent(part, device))

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Batch:
        def moved(part: Any) -> Any:
            if isinstance(part, SoftTargets | Images):
                return type(part)(*map(moved, part))
            return move(part) if isinstance(part, Tensor) else part

        return replace(self, **{f.name: moved(getattr(self, f.name)) for f in fields(self) if f.name != "documents_BS"})


def check_cache(
    reader: CacheReader, tokenizer: Tokenizer, corpus: PackedCorpus, vocab_size: int, *, student: bool = False
) -> None:
    """Refuses a cache of another tokenizer, vocabulary, packing length or corpus.

    A student's vocabulary may be the teacher's with rows after it, for padding or added tokens: ids mean the same, and
    soft targets give the added rows nothing. Its tokenizer may then be another, if the teacher's is found (above the
    cache, where a run leaves it) and its ids mean the same in the student's. Samples in which added tokens occur are of
    another corpus; they never get targets of a teacher without these tokens.

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
    """Whether the cache's tokenizer is found above the cache and `tokenizer` only adds to it."""
    if is_url(reader.folder):
        return False
    for folder in list(Path(reader.folder).absolute().parents)[:2]:  # a mixture's cache lies one folder deeper
        path = folder / TOKENIZER
        if path.exists():
            theirs = load_tokenizer(TokenizerConfig(bos=None, eos=None), path)
            if theirs.digest == reader.header.tokenizer:
                return tokenizer.extends(theirs)
    return False


class Joiner:
    """Makes batches.

    Args:
        corpora: in the order of their numbers in the stream.
        readers: the cache of each corpus; None: no soft targets.
        on_missing: `hard`: samples without targets are not covered; `fail`: they are an error.
        levels: of the teachers of the caches.
    """

    def __init__(
        self,
        corpora: list[PackedCorpus],
        readers: list[CacheReader] | None,
        on_missing: OnMissing,
        levels: TeacherLevels | None = None,
    ):
        assert readers is None or len(readers) == len(corpora), "one cache for each corpus"
        assert len({corpus.sample_tokens for corpus in corpora}) <= 1, "one length of samples"
        self._corpora, self._readers, self._on_missing, self._levels = corpora, readers, on_missing, levels

    @property
    def views(self) -> list[dict[str, int]]:
        """The view of each cache's reader, in the order of corpora; empty without caches."""
        return [reader.view for reader in self._readers or []]

    @property
    def is_live(self) -> bool:
        """A teacher was in training when the student began to follow it."""
        return self._levels is not None and self._levels.limit is not None

    def batch(self, corpus_B: NDArray[np.int64], sample_ids_B: NDArray[np.int64], step: int = 0) -> Batch:
        """The samples of these ids, each of its corpus, in this order, for the student's step `step`.

        Raises:
            CacheError: tokens are not those of the teacher, or (on_missing=fail) a sample has no targets.
            DataError: a corpus is damaged.
        """
        corpus_B, sample_ids_B = np.asarray(corpus_B, np.int64), np.asarray(sample_ids_B, np.int64)
        assert corpus_B.shape == sample_ids_B.shape and corpus_B.ndim == 1 and len(corpus_B), "one id per sample"
        # Samples are read corpus by corpus; sample b of the batch is number back_B[b] of those that are read.
        ids_by_corpus = {int(c): sample_ids_B[corpus_B == c] for c in np.unique(corpus_B)}
        back_B = np.argsort(np.argsort(corpus_B, kind="stable"))
        samples = [self._corpora[c].take(ids) for c, ids in ids_by_corpus.items()]
        ids, documents, mask, digests = (np.concatenate(column)[back_B] for column in list(zip(*samples))[:4])
        tokens = torch.from_numpy(ids.astype(np.int64))
        joined = Joined.none(len(ids))
        if self._readers is not None:
            results = [self._read(c, ids_by_corpus[c], part.digests) for c, part in zip(ids_by_corpus, samples)]
            levels = [self._level(step, c, result) for c, result in zip(ids_by_corpus, results)]
            joined = _in_order(results, levels, torch.from_numpy(back_B), tokens.shape[1] - 1)
        return Batch(
            ids_BS=tokens[:, :-1],
            labels_BS=tokens[:, 1:],
            valid_BS=torch.from_numpy(mask[:, 1:]),
            documents_BS=torch.from_numpy(documents[:, :-1]),
            sample_ids_B=sample_ids_B,
            corpus_B=corpus_B,
            digests_B=digests,
            **joined._asdict(),
            images=_images(samples, back_B),
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

    def _level(self, step: int, corpus: int, result: ReadResult) -> Levels:
        if self._levels is None:
            return Levels(*np.full((3, len(result.step_B)), np.nan))
        return self._levels.of(step, corpus, result.teachers, result.teacher_B.numpy(), result.step_B.numpy())


def _images(samples: list[PackedSamples], back_B: NDArray[np.int64]) -> Images | None:
    """The images of a batch whose row b is row `back_B[b]` of all these samples."""
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


class Joined(NamedTuple):
    """Fields of a `Batch` that come from caches."""

    targets: SoftTargets | None
    shard_loss_B: Tensor
    step_B: Tensor
    level_B: Tensor
    end_B: Tensor
    par_B: Tensor

    @classmethod
    def none(cls, samples: int) -> Joined:
        """Of samples that no cache was asked for."""
        unknown_B = torch.full((samples,), torch.nan)
        return cls(None, unknown_B, torch.full((samples,), -1), unknown_B, unknown_B, unknown_B)


def _in_order(results: list[ReadResult], levels: list[Levels], back_B: Tensor, length: int) -> Joined:
    """The targets of a batch whose row b is row `back_B[b]` of all these results; `length`: of a sample."""
    width = max(result.targets.ids_TK.shape[1] for result in results)
    back_T = (back_B[:, None] * length + torch.arange(length)).flatten()

    def targets(name: str) -> Tensor:
        parts = [getattr(result.targets, name) for result in results]
        if name.endswith("_TK"):
            parts = [torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts]
        return torch.cat(parts)[back_T]

    return Joined(
        # The samples of one corpus are in the batch's order already.
        results[0].targets if len(results) == 1 else SoftTargets(*map(targets, SoftTargets._fields)),
        torch.cat([result.shard_loss_B for result in results])[back_B],
        torch.cat([result.step_B for result in results])[back_B],
        *(torch.from_numpy(np.concatenate(column)).float()[back_B] for column in zip(*levels, strict=True)),
    )
