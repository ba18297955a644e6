"""Whole samples from pieces that come in any order, with those that wait on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.cache.store import reported
from distill.tools.imports.encode import Span

_TYPES = (np.int32, np.int32, np.int32, np.uint8, np.float32, np.float32, np.bool_)


class Whole(NamedTuple):
    """A sample, S positions."""

    sample_id: int
    piece: Span


class _Waiting(NamedTuple):
    """A piece in the file."""

    position: int
    offset: int
    sizes: tuple[int, ...]
    """Numbers of each column."""


class Assembler:
    """Keeps pieces until their samples are complete; some 200 bytes of memory for each that waits.

    Use as a context manager: the file goes with it.

    sample_tokens: S.
    """

    def __init__(self, sample_tokens: int):
        self._length = sample_tokens
        self._pieces: dict[int, list[_Waiting]] = {}
        self._done: set[int] = set()
        self._file = tempfile.TemporaryFile(prefix="codistill-import-")  # noqa: SIM115
        self.repeated = 0
        """Pieces of positions that had one already."""

    def __enter__(self) -> Assembler:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def has(self, sample_id: int, position: int, count: int) -> bool:
        """Whether some of these positions are there already; then the piece must not be added."""
        known = sample_id in self._done or any(
            each.position < position + count and position < each.position + each.sizes[0]
            for each in self._pieces.get(sample_id, ())
        )
        self.repeated += known
        return known

    def add(self, sample_id: int, position: int, piece: Span, expected: int) -> Whole | None:
        """Takes a piece that begins at `position`; the sample, if this was the last of its `expected` pieces."""
        others = self._pieces.get(sample_id, [])
        if len(others) + 1 < expected:
            with reported(f"pieces of samples in {tempfile.gettempdir()}"):
                offset = self._file.seek(0, 2)
                for column in piece:
                    self._file.write(np.ascontiguousarray(column).tobytes())
            self._pieces.setdefault(sample_id, []).append(
                _Waiting(position, offset, tuple(len(column) for column in piece))
            )
            return None
        self._pieces.pop(sample_id, None)
        return self._whole(sample_id, [(position, piece)], others)

    def rest(self) -> Iterator[Whole]:
        """The samples that never were complete, with gaps where nothing came."""
        for sample_id in sorted(self._pieces):
            yield self._whole(sample_id, [], self._pieces.pop(sample_id))

    def _whole(self, sample_id: int, pieces: list[tuple[int, Span]], waiting: list[_Waiting]) -> Whole:
        self._done.add(sample_id)
        parts, at = [], 0
        keeps_rest = False
        for position, piece in sorted(pieces + [(w.position, self._read(w)) for w in waiting], key=lambda p: p[0]):
            parts += [_gap(position - at), piece]
            at = position + len(piece.counts_T)
            keeps_rest = keeps_rest or len(piece.rest_T) > 0
        parts.append(_gap(self._length - at))
        whole = Span(*(np.concatenate(column) for column in zip(*parts)))
        return Whole(sample_id, whole if keeps_rest else whole._replace(rest_T=np.zeros(0, np.uint8)))

    def _read(self, waiting: _Waiting) -> Span:
        self._file.seek(waiting.offset)
        columns: list[Any] = []
        for size, kind in zip(waiting.sizes, _TYPES):
            columns.append(np.frombuffer(self._file.read(size * np.dtype(kind).itemsize), kind))
        return Span(*columns)


def _gap(count: int) -> Span:
    assert count >= 0, "pieces overlap"
    none: NDArray[np.int32] = np.zeros(0, np.int32)
    zeros: list[Any] = [np.zeros(count, kind) for kind in (np.int32, np.uint8, np.float32, np.float32, np.bool_)]
    counts, rest, label, entropy, has = zeros
    return Span(counts, none, none, rest, label, entropy, has)
