"""Places of foreign sequences in a packed corpus: by their tokens, or by an order that is given."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from distill.config.errors import DataError
from distill.data.packed import PackedCorpus
from distill.tools.imports.importer import Placement
from distill.tools.imports.sequences import ForeignSequence

Tokens = NDArray[Any]

_CHUNK_TOKENS = 1 << 20


class ByTokens:
    """Finds a sequence whose tokens are those of a sample (its S, with or without the one after), or of a document.

    A document is compared without a token of `starts` (bos) in front and those of `ends` (eos, padding) at its end,
    since stacks differ in them. Equal samples and equal documents are all found. It takes 34 bytes of memory for a
    sample, 17 for a document.

    truncated: longest sequence that the other stack kept; longer documents are found by so many tokens.
    """

    def __init__(self, corpus: PackedCorpus, starts: set[int], ends: set[int], truncated: int | None = None):
        self._length, self._starts, self._ends = corpus.sample_tokens, starts, np.array(sorted(ends), np.int64)
        samples, documents = _Table(), _Table()
        for start, tokens in _documents(corpus, samples):
            content, offset = self._content(tokens)
            if len(content):
                has_bos = offset > 0
                documents.add(content, start + offset, has_bos)
                # Sequences of the greatest length, with and without bos.
                for size in {truncated - 1, truncated} if truncated else ():
                    if 0 < size < len(content):
                        documents.add(content[:size], start + offset, has_bos)
        self._samples, self._documents = samples.close(), documents.close()

    def __call__(self, sequence: ForeignSequence) -> list[Placement]:
        tokens = sequence.tokens
        assert tokens is not None, "a format without tokens is matched by order"
        if len(tokens) in (self._length, self._length + 1):
            count = min(sequence.positions, self._length)
            if runs := [Placement(start, 0, count, True) for start, _ in self._samples.find(tokens)]:
                return runs
        content, offset = self._content(tokens)
        runs = []
        for start, has_bos in self._documents.find(content) if len(content) else ():
            first = max(0, offset - has_bos)
            count = min(sequence.positions, offset + len(content)) - first
            runs.append(Placement(start + first - offset, first, count, False))
        return runs

    def _content(self, tokens: Tokens) -> tuple[Tokens, int]:
        """The tokens between bos and ends, and how many come before them."""
        offset = int(len(tokens) > 0 and int(tokens[0]) in self._starts)
        inside = np.flatnonzero(~np.isin(tokens, self._ends))
        return tokens[offset : max(int(inside[-1]) + 1, offset) if len(inside) else offset], offset


class ByOrder:
    """The n-th sequence is the sample `order[n]`; -1: of another corpus, left out.

    Raises:
        DataError: an id that the corpus does not have; later: more sequences than ids, or of another length.
    """

    def __init__(self, corpus: PackedCorpus, order: NDArray[np.int64], where: str):
        if len(order) and not -1 <= order.min() <= order.max() < len(corpus):
            bad = int(np.flatnonzero((order < -1) | (order >= len(corpus)))[0])
            raise DataError(f"{where}: entry {bad} is {order[bad]}; sample ids are 0 to {len(corpus) - 1}, or -1")
        self._order, self._where, self._length, self._next = order, where, corpus.sample_tokens, 0

    def __call__(self, sequence: ForeignSequence) -> list[Placement] | None:
        if self._next == len(self._order):
            count = len(self._order)
            raise DataError(f"{self._where}: has {count} sample ids, but {sequence.where} is one sequence more")
        sample_id = int(self._order[self._next])
        self._next += 1
        if sample_id < 0:
            return None
        if sequence.positions != self._length:
            raise DataError(
                f"{sequence.where}: {sequence.positions} positions; samples of the corpus have {self._length} "
                "(data.sample_tokens)"
            )
        return [Placement(sample_id * self._length, 0, self._length, True)]


def load_order(path: Path) -> NDArray[np.int64]:
    """Sample ids in the order of training: a .npy of integers, or one number a line.

    Raises:
        DataError: it cannot be read, or holds something else.
    """
    try:
        if path.suffix == ".npy":
            found = np.load(path, allow_pickle=False)
        else:
            found = np.array([json.loads(line) for line in path.read_text().splitlines() if line.strip()])
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a list of sample ids: {error}") from error
    if found.ndim != 1 or (len(found) and not np.issubdtype(found.dtype, np.integer)):
        raise DataError(f"{path}: holds {found.dtype} {list(found.shape)}; it must be a whole number for each sequence")
    return found.astype(np.int64)


class _Table:
    """Places of tokens by their digest."""

    def __init__(self) -> None:
        self._keys, self._places, self._marks = array("Q"), array("q"), array("B")

    def add(self, tokens: Tokens, start: int, flag: bool = False) -> None:
        self._keys.append(_key(tokens))
        self._places.append(start)
        self._marks.append(flag)

    def close(self) -> _Table:
        """No more is added; now it can be searched."""
        keys = np.array(self._keys, np.uint64)
        order = np.argsort(keys, kind="stable")
        self._sorted, self._starts = keys[order], np.array(self._places, np.int64)[order]
        self._flags = np.array(self._marks, np.bool_)[order]
        del self._keys, self._places, self._marks
        return self

    def find(self, tokens: Tokens) -> list[tuple[int, bool]]:
        """Where these tokens start, and the flag of each place."""
        key = np.uint64(_key(tokens))
        a, b = (int(np.searchsorted(self._sorted, key, side)) for side in ("left", "right"))  # type: ignore[call-overload]
        return list(zip(self._starts[a:b].tolist(), self._flags[a:b].tolist()))


def _key(tokens: Tokens) -> int:
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(tokens, "<i8").data)


def _documents(corpus: PackedCorpus, samples: _Table) -> Iterator[tuple[int, Tokens]]:
    """Every document with a label: where it starts in the corpus, and its tokens. Fills the table of samples, too.

    A sample's last token is the next one's first, unless there is none; then it counts where its document goes on.
    """
    length = corpus.sample_tokens
    # Of the document that is not at its end yet.
    tokens: Tokens = np.zeros(0, np.int32)
    is_label = np.zeros(0, np.bool_)
    start, goes_on = 0, False
    for first in range(0, len(corpus), step := max(1, _CHUNK_TOKENS // length)):
        chunk = corpus.take(np.arange(first, min(first + step, len(corpus))))
        for i, ids in enumerate(chunk.ids, start=first):
            samples.add(ids[:-1], i * length)
            samples.add(ids, i * length)
        changes = np.diff(chunk.documents, axis=1) != 0
        begins = np.concatenate([[[not goes_on]], changes[:-1, -1:]]), changes[:, :-1]
        borders = np.flatnonzero(np.concatenate(begins, axis=1)) + len(tokens)
        tokens = np.concatenate([tokens, chunk.ids[:, :-1].ravel()])
        is_label = np.concatenate([is_label, chunk.mask[:, :-1].ravel()])
        goes_on = not changes[-1, -1]
        if first + step >= len(corpus) and goes_on:
            tokens, is_label = np.append(tokens, chunk.ids[-1, -1]), np.append(is_label, chunk.mask[-1, -1])
        for a, b in pairwise([0, *borders[borders > 0].tolist()]):
            if is_label[a:b].any():
                yield start + a, tokens[a:b]
        last = int(borders[-1]) if len(borders) else 0
        start, tokens, is_label = start + last, tokens[last:], is_label[last:]
    if is_label.any():
        yield start, tokens
