"""What a person reads while a run goes on: progress and warnings on stderr, messages on stdout.

So `> result.txt` keeps results and shows progress.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from distill.config import units
from distill.config.schema import ConsoleMode
from distill.config.terminal import Progress


class Console:
    """Progress of the jobs of a run, which take turns, and messages that do not tear its live line."""

    def __init__(
        self,
        mode: ConsoleMode,
        *,
        live: TextIO | None = None,
        out: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._live, self._out, self._silent = live or sys.stderr, out or sys.stdout, mode is ConsoleMode.off
        self._progress = Progress(units.tokens, mode=mode, stream=self._live, clock=clock)
        self.close = self._progress.close

    def progress(self, job: str, step: int, total: int, *, tokens: int, text: str = "") -> None:
        """Steps done of all steps, and the tokens of the steps since the job's previous call."""
        self._progress.update(job, step, total, amount=tokens, text=text)

    def message(self, text: str) -> None:
        """Print text for good, above the live line; nothing with console=off."""
        if not self._silent:
            self._print(self._out, text)

    def warn(self, text: str) -> None:
        """Print a warning for good, whatever the mode."""
        self._print(self._live, f"warning: {text}")

    def _print(self, stream: TextIO, text: str) -> None:
        with self._progress.interrupted():
            stream.write(text + "\n")
            stream.flush()
