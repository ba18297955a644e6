"""How good each teacher of a cache was at each of its steps, and where it ends: smooth curves through its label losses.

A level is a loss of the teacher's whole text, not of the sample at hand, so that a step whose text is easy does not
count as a better teacher. The caches keep sums of losses by bins of steps that do not depend on where shards are cut,
so neither do levels.

Of a teacher that trains while the student follows, a student's step sees the bins up to a teacher's step that is a
function of the student's own, for which it waits anyway; the end is extrapolated to the teacher's planned length. So
levels do not depend on what happens to be published.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.cache import CacheReader
from distill.cache.loss_curve import LossCurve, LossSums, last_steps

Floats = NDArray[np.float64]

OFFSET = 0.02
"""Steps are looked at as log(step + OFFSET x length): nearly linear at first, where a loss falls by the step."""
WIDTH = 0.12
"""Standard deviation of the smoothing kernel on that axis."""
BEGINNING = 0.9
"""Share of a uniform distribution's loss that a teacher has in its first steps at least."""


class Trend:
    """A teacher's smooth loss by step: local linear regression at each of its bins, and straight between them, so that
    no slope of neighbours is drawn out over steps of which no loss is known.

    Args:
        length: the teacher's planned steps; 0: not known.
        trains: it is on its way to them; else it has ended, be it before its plan or with a plan that is not known.

    Source: Cleveland, Robust locally weighted regression, 1979, with a Gaussian kernel and the bins' tokens as weights.
    """

    def __init__(self, curve: LossCurve, length: int, trains: bool):
        first_N, last_N = curve.first_steps, last_steps(curve.first_steps)
        self.length = length if length > first_N[-1] else int(last_N[-1]) + 1
        last_N = np.minimum(last_N, self.length - 1)
        self.last = int(last_N[-1])
        """The last step of the bins."""
        self._first, self._trains, self._shift = float(curve.losses[0]), trains, OFFSET * self.length
        self._x_N = np.log((first_N + last_N) / 2.0 + self._shift)
        self._loss_N = _lines(self._x_N, curve.losses, curve.tokens)

    def level(self, steps: NDArray[Any]) -> Floats:
        """Nats at each step; beyond the bins that of the nearest."""
        return np.interp(np.log(np.maximum(steps, 0) + self._shift), self._x_N, self._loss_N)

    def began(self, most: float) -> bool:
        """The curve has the teacher's beginning: its first loss is nearly `most`, that of a uniform distribution. Else
        it had a head start."""
        return self._first > BEGINNING * most

    @cached_property
    def end(self) -> float:
        """Nats at the end. Of a teacher that trains, the falls of further doublings of the steps go on up to its plan
        as a geometric series, as they do on a power law."""
        last = float(np.exp(self._x_N[-1]) - self._shift)
        now = float(self._loss_N[-1])
        if not self._trains or last < 4.0:
            return now
        doublings = float(np.log2(self.length / (self.last + 1)))
        quarter, half = self.level(np.array([last / 4, last / 2])).tolist()
        fall = max(half - now, 0.0)
        ratio = min(max(fall / max(quarter - half, 1e-9), 0.25), 1.0)
        further = doublings if ratio == 1.0 else (1.0 - ratio**doublings) / (1.0 - ratio)
        return now - fall * ratio * further


def _lines(x_N: Floats, y_N: Floats, tokens_N: NDArray[np.int64]) -> Floats:
    """The value at each x of the weighted regression line around it."""
    away_NN = x_N - x_N[:, None]
    w_NN = tokens_N * np.exp(-0.5 * (away_NN / WIDTH) ** 2)
    w_NN = w_NN / w_NN.sum(1, keepdims=True)
    mean_x_N, mean_y_N = (w_NN * away_NN).sum(1), w_NN @ y_N
    off_NN = away_NN - mean_x_N[:, None]
    spread_N = (w_NN * off_NN**2).sum(1)
    slope_N = (w_NN * off_NN) @ y_N / np.maximum(spread_N, 1e-12)
    return mean_y_N - np.where(spread_N > 1e-12, slope_N, 0.0) * mean_x_N


class Levels(NamedTuple):
    """Of B samples, float64 nats; nan where a sample has no targets."""

    level_B: Floats
    """Of the teacher that made the targets, at the step at which it did."""
    end_B: Floats
    """Where the best teacher of the sample's cache ends."""
    par_B: Floats
    """Where the best of the cache's teachers was after as many samples as the student has had: what labels alone give.
    inf where no teacher was captured from its first steps on, or where the targets were made after its training."""


class TeacherLevels:
    """The curves of all teachers in the caches of a student's corpora.

    Args:
        lengths: planned steps of the teacher that each cache was made for; 0: there is none.
        paces: steps of that teacher for each step of the student, at equal samples; nan: not known.
        limit: student's step -> the teacher's step whose records are all published when the student makes it; None:
            everything in the readers' views counts, and a teacher trains on if its stream there is not complete.
    """

    def __init__(
        self, readers: Sequence[CacheReader], lengths: Sequence[int], paces: Sequence[float],
        limit: Callable[[int], int] | None = None,
    ):  # fmt: skip
        self._readers, self._lengths, self._paces, self.limit = readers, lengths, paces, limit
        self._made: dict[int, tuple[Any, dict[tuple[str, str], Trend]]] = {}

    def of(
        self, step: int, corpus: int, teachers: Sequence[tuple[str, str]], teacher_B: NDArray[np.int64],
        steps_B: NDArray[np.int64],
    ) -> Levels:  # fmt: skip
        """Levels of samples of one corpus.

        Args:
            step: the student's.
            teachers: identity and source of each; teacher_B: number of each sample's, -1: no targets.
            steps_B: the teacher's step when it made the targets.
        """
        trends = self._trends(step, corpus)
        level_B, par_B = np.full((2, len(teacher_B)), np.nan)
        par = self._par(step, corpus, trends)
        for number, teacher in enumerate(teachers):
            mine = teacher_B == number
            if teacher in trends:
                level_B[mine] = trends[teacher].level(steps_B[mine])
                par_B[mine] = par if teacher[1] == "capture" else np.inf
        end = min((trend.end for trend in trends.values()), default=np.nan)
        return Levels(level_B, np.where(teacher_B >= 0, end, np.nan), par_B)

    def _par(self, step: int, corpus: int, trends: dict[tuple[str, str], Trend]) -> float:
        at = step * self._paces[corpus]
        if np.isnan(at):
            return np.inf
        most = np.log(self._readers[corpus].header.vocab_size)
        captured = (trend for (_, source), trend in trends.items() if source == "capture" and trend.began(most))
        return min((float(trend.level(np.array([at]))[0]) for trend in captured), default=np.inf)

    def _trends(self, step: int, corpus: int) -> dict[tuple[str, str], Trend]:
        """By identity and source; as they were, as long as neither what counts nor the view has changed."""
        reader, limit = self._readers[corpus], None if self.limit is None else self.limit(step)
        state = limit, reader.view
        if corpus not in self._made or self._made[corpus][0] != state:
            trains = limit is not None or bool(reader.open_streams)
            self._made[corpus] = state, _curves(reader.losses, self._lengths[corpus], limit, trains)
        return self._made[corpus][1]


def _curves(losses: LossSums, length: int, limit: int | None, trains: bool) -> dict[tuple[str, str], Trend]:
    trends = {}
    for teacher in losses.teachers():
        curve, is_capture = losses.curve(*teacher), teacher[1] == "capture"
        if limit is not None and is_capture:
            curve = _until(curve, limit)
        if len(curve.first_steps):
            trends[teacher] = Trend(curve, length if is_capture else 0, trains and is_capture)
    for identity, source in list(trends):
        # What a teacher labelled when it was frozen may be easier than its text: where it was on its own curve counts.
        base, _, step = identity.rpartition("@")
        own = trends.get((base, "capture"))
        if source != "capture" and own is not None and int(step) <= own.last + 1:
            trends[identity, source] = own
    return trends


def _until(curve: LossCurve, step: int) -> LossCurve:
    """The bins that end at or before a step."""
    whole_N = last_steps(curve.first_steps) < step
    return LossCurve(curve.first_steps[whole_N], curve.losses[whole_N], curve.tokens[whole_N])
