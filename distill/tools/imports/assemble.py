"""Whole samples from spans that come in any order; those that wait are on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from distill.cache.store import reported
from distill.tools.imports.encode import Span


class WholeSample(NamedTuple):
    """A sample, S positions."""

    sample_id: int
    span: Span


class _Waiting(NamedTuple):
    """A span in the file."""

    start: int
    """First position, and the one after the last."""
    end: int
    offset: int


class Assembler:
    """Keeps spans until their samples are complete; some 200 bytes of memory for each that waits.

    Use as a context manager: the file goes with it.

    sample_tokens: S.
    """

    def __init__(self, sample_tokens: int):
        self._length = sample_tokens
        self._waiting: dict[int, list[_Waiting]] = {}
        self._done: set[int] = set()
        self._file = tempfile.TemporaryFile(prefix="codistill-import-")  # noqa: SIM115
        self.repeated = 0
        """Spans of positions that had one already."""

    def __enter__(self) -> Assembler:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def has(self, sample_id: int, start: int, count: int) -> bool:
        """Whether some of these positions are there already; then the span must not be added."""
        is_known = sample_id in self._done or any(
            each.start < start + count and start < each.end for each in self._waiting.get(sample_id, ())
        )
        self.repeated += is_known
        return is_known

    def add(self, sample_id: int, start: int, span: Span, expected: int) -> WholeSample | None:
        """Adds a span that begins at position `start`; the sample, if this was the last of its `expected` spans."""
        others = self._waiting.setdefault(sample_id, [])
        if len(others) + 1 == expected:
            return self._whole(sample_id, {start: span})
        with reported(f"spans of samples in {tempfile.gettempdir()}"):
            offset = self._file.seek(0, 2)
            for column in span:
                np.save(self._file, column)
        others.append(_Waiting(start, start + len(span.counts_T), offset))
        return None

    def rest(self) -> Iterator[WholeSample]:
        """The samples that never were complete, with gaps where nothing came."""
        for sample_id in sorted(self._waiting):
            yield self._whole(sample_id, {})

    def _whole(self, sample_id: int, spans: dict[int, Span]) -> WholeSample:
        """From spans by their first position, and those that wait."""
        self._done.add(sample_id)
        for each in self._waiting.pop(sample_id):
            self._file.seek(each.offset)
            spans[each.start] = Span(*(np.load(self._file) for _ in Span._fields))
        has_rest = any(len(span.rest_T) for span in spans.values())
        parts, end = [], 0
        for start, span in sorted(spans.items(), key=lambda item: item[0]):
            parts += [_gap(start - end, has_rest), span]
            end = start + len(span.counts_T)
        parts.append(_gap(self._length - end, has_rest))
        return WholeSample(sample_id, Span(*(np.concatenate(column) for column in zip(*parts))))


def _gap(count: int, has_rest: bool) -> Span:
    """A span without distributions."""
    assert count >= 0, "spans overlap"
    none, zeros = np.zeros(0, np.int32), np.zeros(count, np.float32)
    rest = np.zeros(count if has_rest else 0, np.uint8)
    return Span(np.zeros(count, np.int32), none, none, rest, zeros, zeros, np.zeros(count, np.bool_))
