"""The teacher's label loss by its step, as sums that do not depend on where shards are cut. No torch.

Steps fall into fixed bins: one for each step below 64, then 32 for each doubling. A token's loss is clipped at 32 nats,
so that no label poisons a mean, and counted in whole units of 2**-20 nats, so that sums are exact in any order.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.cache.format import LABEL_TOP

UNITS = 2**20
"""In a nat."""
_EXACT, _PER_DOUBLING = 64, 32


class LossCurve(NamedTuple):
    """A teacher's mean label loss at n bins of its steps, in the order of steps."""

    first_steps: NDArray[np.int64]
    """The first step of each bin."""
    losses: NDArray[np.float64]
    """Mean over the bin's tokens, nats."""
    tokens: NDArray[np.int64]
    """Tokens that have a target."""


class Sums(NamedTuple):
    """Of one bin."""

    tokens: int
    loss: int
    """In 2**-20 nats."""


def bin_of(step: int) -> int:
    """The bin of a step."""
    shift = max(step.bit_length() - 6, 0)
    return _PER_DOUBLING * shift + (step >> shift)


def first_step(number: int) -> int:
    """The first step of a bin."""
    shift = max(number // _PER_DOUBLING - 1, 0)
    return (number - _PER_DOUBLING * shift) << shift


def last_steps(first_steps: NDArray[np.int64]) -> NDArray[np.int64]:
    """The last step of the bin that begins at each step."""
    return np.array([first_step(bin_of(first) + 1) - 1 for first in first_steps.tolist()], np.int64)


class LossSums:
    """Sums by teacher, source (capture, backfill or import) and bin; two are equal where all of them are."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], dict[int, Sums]] = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LossSums) and self.json() == other.json()

    __hash__ = None  # type: ignore[assignment]

    def add_tokens(self, teacher: str, source: str, steps_N: NDArray[Any], losses_N: NDArray[Any]) -> None:
        """Adds tokens; losses_N: nats, of those that have a target."""
        units_N = np.rint(np.clip(losses_N.astype(np.float64), 0.0, LABEL_TOP) * UNITS).astype(np.int64)
        for step in np.unique(steps_N).tolist():
            here = units_N[steps_N == step]
            self._add(teacher, source, bin_of(step), Sums(len(here), int(here.sum())))

    def _add(self, teacher: str, source: str, number: int, more: Sums, sign: int = 1) -> None:
        bins = self._sums.setdefault((teacher, source), {})
        old = bins.get(number, Sums(0, 0))
        bins[number] = Sums(old.tokens + sign * more.tokens, old.loss + sign * more.loss)

    def update(self, other: LossSums, sign: int = 1) -> None:
        """Adds the sums of another, or takes them away (sign -1)."""
        for teacher, source, number, sums in other.rows():
            self._add(teacher, source, number, sums, sign)

    def rows(self) -> Iterator[tuple[str, str, int, Sums]]:
        """Teacher, source, bin and sums, in order."""
        for (teacher, source), bins in sorted(self._sums.items()):
            for number, sums in sorted(bins.items()):
                if sums.tokens:
                    yield teacher, source, number, sums

    def json(self) -> list[list[Any]]:
        """[teacher, source, bin, tokens, loss] for each bin that has tokens."""
        return [[teacher, source, number, *sums] for teacher, source, number, sums in self.rows()]

    @classmethod
    def of(cls, rows: Any) -> LossSums:
        """Inverse of `json`; TypeError or ValueError where it is not that."""
        sums = cls()
        for teacher, source, number, tokens, loss in rows:
            kinds = tuple(map(type, (teacher, source, number, tokens, loss)))
            if kinds != (str, str, int, int, int) or number < 0 or tokens <= 0 or not 0 <= loss <= 32 * UNITS * tokens:
                raise ValueError(f"{[teacher, source, number, tokens, loss]!s:.80} is no bin of loss sums")
            sums._add(teacher, source, number, Sums(tokens, loss))
        return sums

    @classmethod
    def total(cls, parts: Iterable[LossSums], less: Iterable[LossSums] = ()) -> LossSums:
        """The sum of several, without others."""
        sums = cls()
        for part in parts:
            sums.update(part)
        for part in less:
            sums.update(part, -1)
        return sums

    def without(self, teachers: Collection[tuple[str, str]]) -> LossSums:
        """The sums of all but these teachers and sources."""
        return LossSums.of(row for row in self.json() if (row[0], row[1]) not in teachers)

    def teachers(self) -> list[tuple[str, str]]:
        """Teacher and source, each once."""
        return list(dict.fromkeys((teacher, source) for teacher, source, _, _ in self.rows()))

    def curve(self, teacher: str | None = None, source: str | None = None) -> LossCurve:
        """The loss by step; None: of all teachers, or sources, together."""
        together = LossSums()
        for each_teacher, each_source, number, sums in self.rows():
            if teacher in (None, each_teacher) and source in (None, each_source):
                together._add("", "", number, sums)
        bins = list(together.rows())
        return LossCurve(
            np.array([first_step(number) for _, _, number, _ in bins], np.int64),
            np.array([sums.loss / UNITS / sums.tokens for _, _, _, sums in bins], np.float64),
            np.array([sums.tokens for _, _, _, sums in bins], np.int64),
        )
