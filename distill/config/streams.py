"""Standard output and error that may go away, as a pipe into `head` or a closed terminal do, without ending a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class Spare:
    """A stream that falls silent at the first error in writing; all else is the stream's own."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            silence(self._stream)
            return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            silence(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def silence(stream: TextIO) -> None:
    """Sends what the stream still holds, and all that follows, nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


@contextmanager
def spared() -> Iterator[None]:
    """Standard output and error are spare inside; None, which they are where a parent has closed them, is nowhere."""
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # whatever is opened later must not be taken for the stream that is closed
    os.close(spare)
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:
        streams: list[Any] = [Spare(stream or nowhere) for stream in before]
        sys.stdout, sys.stderr = streams
        try:
            yield
        finally:
            for stream in streams:
                stream.flush()  # else Python would, as it ends, and complain
            sys.stdout, sys.stderr = before
