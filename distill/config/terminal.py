"""Tables and progress for people at a terminal, drawn by rich; plain lines where stderr is not a terminal.

rich is imported at the first use, so that a tool that prints neither starts without it.
"""

from __future__ import annotations

import io
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from distill.config.schema import ConsoleMode
from distill.config.units import duration, file_size, grouped

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

REDRAW, PLAIN = 0.1, 10.0
"""Seconds between redraws of the live line, and between plain lines of a task."""
MEMORY = 30.0
"""Seconds of a task's own time after which a measurement counts 1/e in its rate."""
BAR = 20
"""Characters of a whole bar."""
CLEAR = "\r\x1b[2K"
"""Erases the line under the cursor."""


def text_table(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> list[str]:
    """Lines of a table: the first column aligned left, the others right, two spaces between them, never wrapped.

    header: one text a column, of one or more lines, aligned at the top; a rule is drawn below it.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_header=bool(header), show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    height = max((title.count("\n") for title in header), default=0)
    for i in range(len(rows[0]) if rows else len(header)):
        title = header[i] + "\n" * (height - header[i].count("\n")) if header else ""
        table.add_column(Text(title), justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    page = io.StringIO()
    Console(file=page, width=1 << 16, color_system=None, force_terminal=False).print(table)
    return [line.rstrip() for line in page.getvalue().splitlines()]


@dataclass
class TaskPace:
    """Speed of one task over the time that was its own; decayed sums, so that it is right from the first interval."""

    done: float
    total: float | None
    seconds: float = 0.0
    recent_done: float = 0.0
    recent_amount: float = 0.0
    shown: float = -math.inf
    lines: int = 0

    def advance(self, done: float, total: float | None, amount: float, seconds: float) -> None:
        old = math.exp(-seconds / MEMORY)
        self.seconds = self.seconds * old + seconds
        self.recent_done = self.recent_done * old + done - self.done
        self.recent_amount = self.recent_amount * old + amount
        self.done, self.total = done, total

    @property
    def share(self) -> float | None:
        """What is done of all, at most 1; None where all is unknown."""
        if self.total is None:
            return None
        return min(self.done / self.total, 1.0) if self.total else 1.0

    @property
    def finished(self) -> bool:
        return self.share == 1.0

    @property
    def rate(self) -> float | None:
        """Amount a second; None before the first interval."""
        return self.recent_amount / self.seconds if self.seconds > 0 and self.recent_amount > 0 else None

    @property
    def left(self) -> float | None:
        """Seconds of its own time until the task is done; None where that is unknown."""
        if self.total is None:
            return None
        if self.finished:
            return 0.0
        return (self.total - self.done) * self.seconds / self.recent_done if self.recent_done > 0 else None


class Progress:
    """Progress of tasks that take turns: share, count, rate, and the time left until all that have begun are done.

    One live line on a terminal; elsewhere a plain line of a task every PLAIN seconds; nothing with `ConsoleMode.off`.
    The time between two calls of `update` belongs to the task of the later call, which has just advanced; a task's
    first call only sets where it starts, so that a resumed run is not taken for an infinitely fast one.

    Args:
        unit: an amount as text with its unit, for the rate: `units.tokens`, `units.file_size`.
        count: `done` and `total` as text; None leaves them out.
        transient: the line of a finished task is erased, and one that printed no plain line so far prints no last one.
        stream: stderr unless given.
    """

    def __init__(
        self,
        unit: Callable[[float], str],
        *,
        count: Callable[[float], str] | None = grouped,
        mode: ConsoleMode = ConsoleMode.auto,
        transient: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._unit, self._count, self._transient, self._clock = unit, count, transient, clock
        self._stream = stream or sys.stderr
        if mode is ConsoleMode.auto:
            terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
            mode = ConsoleMode.bar if terminal else ConsoleMode.lines
        self._mode = mode
        self._paces: dict[str, TaskPace] = {}
        self._last: float = clock()
        self._line: Text | None = None
        self._console: Console | None = None

    def update(self, task: str, done: float, total: float | None, *, amount: float, text: str = "") -> None:
        """Done of all (None: unknown), the amount since the task's previous call, and a text for the line's end."""
        now = self._clock()
        pace = self._paces.get(task)
        if pace is None:
            pace = self._paces[task] = TaskPace(done, total)
            if self._mode is ConsoleMode.lines or self._transient:
                pace.shown = now
        else:
            pace.advance(done, total, amount, now - self._last)
        self._last = now
        due = now - pace.shown >= (PLAIN if self._mode is ConsoleMode.lines else REDRAW)
        last = pace.finished and (pace.lines > 0 or not self._transient)
        if self._mode is ConsoleMode.off or not (due or last):
            return
        pace.shown, pace.lines = now, pace.lines + 1
        if self._mode is ConsoleMode.lines:
            self._write("  ".join(self._parts(task, pace, text)) + "\n")
            return
        from rich.text import Text

        parts = [Text(part) for part in self._parts(task, pace, text)]
        if pace.share is not None:
            full = round(BAR * pace.share)
            parts.insert(1, Text("━" * full, "cyan") + Text("╌" * (BAR - full), "bright_black"))
        self._line = Text("  ").join(parts)
        self._draw()
        if pace.finished and not self._transient:
            self.close()

    def close(self) -> None:
        """End the live line: it stays as it is, or is erased where it is transient."""
        if self._line is not None:
            self._write(CLEAR if self._transient else "\n")
            self._line = None

    def print(self, text: str, stream: TextIO | None = None) -> None:
        """Print a line for good, above the live line; to stderr unless `stream` is given, whatever the mode."""
        if self._line is not None:
            self._write(CLEAR)
        print(text, file=stream or self._stream, flush=True)
        if self._line is not None:
            self._draw()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _parts(self, task: str, pace: TaskPace, text: str) -> list[str]:
        parts = [task if pace.share is None else f"{task:<7} {math.floor(100 * pace.share):3d} %"]
        if self._count is not None:
            parts.append(self._count(pace.done) + ("" if pace.total is None else f"/{self._count(pace.total)}"))
        if pace.rate is not None:
            parts.append(f"{self._unit(pace.rate)}/s")
        lefts = [each.left for each in self._paces.values()]
        known = [left for left in lefts if left is not None]
        if len(known) == len(lefts) and sum(known) > 0:
            parts.append(f"{duration(sum(known))} left")
        return [*parts, text] if text else parts

    def _draw(self) -> None:
        assert self._line is not None
        if self._console is None:
            from rich.console import Console

            self._console = Console(file=self._stream, force_terminal=True, highlight=False)
        line = self._line.copy()
        line.truncate(max(self._console.width - 1, 20), overflow="crop")
        self._write(CLEAR)
        self._console.print(line, end="", no_wrap=True, overflow="crop")
        self._stream.flush()

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


@contextmanager
def advancing(task: str, total: float, unit: Callable[[float], str] = file_size) -> Iterator[Callable[[float], None]]:
    """Progress of one task: the function that is handed out adds to what is done, in `unit`; nothing stays of it."""
    done = 0.0
    with Progress(unit, count=unit, transient=True) as progress:
        progress.update(task, done, total, amount=0)

        def advance(amount: float) -> None:
            nonlocal done
            done += amount
            progress.update(task, done, total, amount=amount)

        yield advance
