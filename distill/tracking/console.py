"""What a person sees while a run goes on: one live line on a terminal, a plain line now and then elsewhere.

Progress and warnings go to stderr, messages to stdout, so that `> result.txt` keeps results and shows progress.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from distill.config.schema import ConsoleMode
from distill.config.units import duration, short

REDRAW, PLAIN = 0.1, 10.0
"""Seconds between redraws of the live line, and between plain lines of a job."""
MEMORY = 30.0
"""Seconds of a job's own time after which a measurement counts 1/e in its rate."""
CLEAR = "\r\x1b[2K"


@dataclass
class _Pace:
    """Speed of one job over the time that was its own; decayed sums, so that it is right from the first interval."""

    step: int
    total: int
    seconds: float = 0.0
    steps_done: float = 0.0
    tokens_done: float = 0.0
    shown: float = -math.inf

    def advance(self, step: int, total: int, tokens: int, seconds: float) -> None:
        old = math.exp(-seconds / MEMORY)
        self.seconds = self.seconds * old + seconds
        self.steps_done = self.steps_done * old + step - self.step
        self.tokens_done = self.tokens_done * old + tokens
        self.step, self.total = step, total

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens_done / self.seconds if self.seconds > 0 and self.tokens_done > 0 else None

    @property
    def left(self) -> float | None:
        """Seconds of its own time until the job is done; None before the first interval."""
        if self.step >= self.total:
            return 0.0
        return (self.total - self.step) * self.seconds / self.steps_done if self.steps_done > 0 else None


class Console:
    """Progress of several jobs that take turns.

    The time between two calls of `progress` belongs to the job of the later call, which has just made a step; a
    job's first call only says where it starts, so a resumed run is not taken for an infinitely fast one.
    """

    def __init__(
        self,
        mode: ConsoleMode,
        *,
        live: TextIO | None = None,
        out: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._live, self._out, self._clock = live or sys.stderr, out or sys.stdout, clock
        if mode is ConsoleMode.auto:
            terminal = self._live.isatty() and os.environ.get("TERM") != "dumb"
            mode = ConsoleMode.bar if terminal else ConsoleMode.lines
        self._mode = mode
        self._paces: dict[str, _Pace] = {}
        self._last: float = clock()
        self._line = ""

    def progress(self, job: str, step: int, total: int, *, tokens: int, text: str = "") -> None:
        """Steps done of all steps, and the tokens of the steps since the job's previous call."""
        now = self._clock()
        pace = self._paces.get(job)
        if pace is None:
            pace = self._paces[job] = _Pace(step, total)
            if self._mode is ConsoleMode.lines:
                pace.shown = now
        else:
            pace.advance(step, total, tokens, now - self._last)
        self._last = now
        done = step >= total
        if self._mode is ConsoleMode.off or not (done or now - pace.shown >= self._interval):
            return
        pace.shown = now
        if self._mode is ConsoleMode.lines:
            self._write(self._live, self._describe(job, pace, text, bar=False) + "\n")
            return
        width = max(shutil.get_terminal_size().columns - 1, 20)
        self._line = self._describe(job, pace, text, bar=True)[:width]
        self._write(self._live, CLEAR + self._line + ("\n" if done else ""))
        if done:
            self._line = ""

    def message(self, text: str) -> None:
        """Print text for good, above the live line; nothing with console=off."""
        if self._mode is not ConsoleMode.off:
            self._permanent(self._out, text)

    def warn(self, text: str) -> None:
        """Print a warning for good, whatever the mode."""
        self._permanent(self._live, f"warning: {text}")

    def close(self) -> None:
        """Leave the live line as it stands and end it."""
        if self._line:
            self._write(self._live, "\n")
            self._line = ""

    @property
    def _interval(self) -> float:
        return PLAIN if self._mode is ConsoleMode.lines else REDRAW

    def _permanent(self, stream: TextIO, text: str) -> None:
        if self._line:
            self._write(self._live, CLEAR)
        self._write(stream, text + "\n")
        if self._line:
            self._write(self._live, self._line)

    def _describe(self, job: str, pace: _Pace, text: str, *, bar: bool) -> str:
        share = min(pace.step / pace.total, 1.0) if pace.total else 1.0
        parts = [f"{job:<8}{math.floor(100 * share):3d} %"]
        if bar:
            full = round(20 * share)
            parts.append("━" * full + "╌" * (20 - full))
        parts.append(f"{pace.step:,}/{pace.total:,}")
        if (rate := pace.tokens_per_second) is not None:
            parts.append(f"{short(rate)} tokens/s")
        # Jobs that take turns end together: what counts is the time until all that have begun are done.
        if (left := self._left()) is not None and left > 0:
            parts.append(f"{duration(left)} left")
        return "  ".join([*parts, text] if text else parts)

    def _left(self) -> float | None:
        lefts = [pace.left for pace in self._paces.values()]
        known = [left for left in lefts if left is not None]
        return sum(known) if len(known) == len(lefts) else None

    @staticmethod
    def _write(stream: TextIO, text: str) -> None:
        stream.write(text)
        stream.flush()
