"""Standard output and error may be closed by their reader, such as `head` or a terminal, without ending a run."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class Spare:
    """A stream that writes nothing more after its first error in writing; all else is the stream's own."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            silence(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            silence(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def silence(stream: TextIO) -> None:
    """Sends what the stream's buffer holds, and all that follows, to /dev/null."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


@contextmanager
def spared() -> Iterator[None]:
    """Standard output and error are `Spare` inside; one that is None, since a parent has closed it, is /dev/null."""
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # else a file that is opened later gets the number of the closed stream
    os.close(spare)
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:
        streams: list[Any] = [Spare(stream or nowhere) for stream in before]
        sys.stdout, sys.stderr = streams
        try:
            yield
        finally:
            for stream in streams:
                stream.flush()  # else Python does, as it ends, and prints the error
            sys.stdout, sys.stderr = before
