"""Ctrl-C and SIGTERM: a handler takes note, and whoever is at a point where ending is safe looks at the note.

A step of training is such a point, and so is every turn of a long loop; nothing is ended in the middle. A second Ctrl-C
does not wait.
"""

from __future__ import annotations

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
    """A signal asked to stop, and all is in a state to go on from. No Exception: nobody is to take it for a fault."""

    def __init__(self, number: signal.Signals):
        super().__init__(number.name)
        self.exit_code = EXIT_CODES[number]
        self.word = "interrupted" if number == signal.SIGINT else "stopped"


def asked() -> signal.Signals | None:
    """The signal that asks to stop; Ctrl-C before SIGTERM, which launchers send after it."""
    return min(_asked, default=None)


def check() -> None:
    """Raises Stopped if a signal asks to stop."""
    if (number := asked()) is not None:
        raise Stopped(number)


def checked(items: Iterable[T]) -> Iterator[T]:
    """The items, with a look at the signals before each."""
    for item in items:
        check()
        yield item


def listen() -> dict[signal.Signals, Any]:
    """Takes note of Ctrl-C and SIGTERM from now on; what is ignored (nohup, a shell's `&`) stays so. Returns who had
    listened."""
    before = {number: signal.getsignal(number) for number in EXIT_CODES}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _note)
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
        _asked.clear()  # nobody is asked any more


def _note(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT and signal.SIGINT in _asked:
        os._exit(EXIT_CODES[signal.SIGINT])
    _asked.append(signal.Signals(number))
