"""Ctrl-C and SIGTERM: a handler records the signal, and code at a point where ending is safe checks the record.

The end of a training step is such a point, and so is every turn of a long loop; nothing is ended in the middle. A
second Ctrl-C ends the process at once.
"""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}
"""75 is EX_TEMPFAIL of sysexits.h: the same command may be started again."""

_asked: list[signal.Signals] = []


class Stopped(BaseException):
    """The run ends for a signal, in a state to go on from. No Exception, so that no handler takes it for a fault."""

    def __init__(self, number: signal.Signals):
        super().__init__(number.name)
        self.exit_code = EXIT_CODES[number]
        self.word = "interrupted" if number == signal.SIGINT else "stopped"


def asked() -> signal.Signals | None:
    """The signal that arrived, if one did; Ctrl-C before SIGTERM, which launchers send after it."""
    return min(_asked, default=None)


def check() -> None:
    """Raises Stopped if a signal arrived."""
    if (number := asked()) is not None:
        raise Stopped(number)


def checked(items: Iterable[T]) -> Iterator[T]:
    """The items, with a `check` before each."""
    for item in items:
        check()
        yield item


def listen() -> dict[signal.Signals, Any]:
    """Records Ctrl-C and SIGTERM from now on; returns the handlers before. An ignored signal (nohup, `&`) stays so."""
    before = {number: signal.getsignal(number) for number in EXIT_CODES}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _record)
    return before


@contextmanager
def signals() -> Iterator[None]:
    """`listen` inside."""
    if threading.current_thread() is not threading.main_thread():  # Python gives signals to that one alone
        yield
        return
    before = listen()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked.clear()


def _record(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT and signal.SIGINT in _asked:
        os._exit(EXIT_CODES[signal.SIGINT])
    _asked.append(signal.Signals(number))
