"""What a backfill labels and in which order: a pure function of what the caches hold, so that it is repeatable.

A record is stale when the loss of the teacher that made it exceeds the best loss of its cache by some lag. A sample is
worth the nats per token by which its targets can improve. A stale record: its loss less that of the frozen teacher,
where that is known, else less the best of its cache; if the frozen teacher is no better, nothing. A gap: as if it
were filled by uniform distributions (log V nats, or the worst record's loss where that is worse), so a gap is worth at
least as much as the stalest record. Worth per floating-point operation orders the work; where a budget cuts
it, samples of equal worth are taken from all over the corpus. What is done already is not in the plan, so a run that is
started again does what is left.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Held(NamedTuple):
    """What the cache of one corpus of N samples holds."""

    covered_N: NDArray[np.bool_]
    loss_N: NDArray[np.float64]
    """Nats: mean label loss of the teacher that made the sample's targets; nan where not covered or unknown."""
    mine_N: NDArray[np.bool_]
    """The frozen teacher's own: never stale."""
    teacher_loss: float = math.nan
    """Nats: the frozen teacher's mean label loss on such samples; nan: unknown."""

    @property
    def best(self) -> float:
        """Nats: the least loss of any record; nan where none has one."""
        losses = self.loss_N[self.covered_N & ~np.isnan(self.loss_N)]
        return float(losses.min()) if len(losses) else math.nan


class Unit(NamedTuple):
    """Samples of one corpus that are labelled together."""

    corpus: int
    sample_ids: Ints
    """Ascending."""
    worth: float
    """Nats per token, mean over the samples."""


class Plan(NamedTuple):
    units: list[Unit]
    gaps_C: list[int]
    """Samples of the plan and each corpus that have no targets yet; the others' are stale."""
    left_out: int
    """Samples in need for which the budget does not suffice."""

    @property
    def samples(self) -> int:
        return sum(len(unit.sample_ids) for unit in self.units)

    @property
    def gaps(self) -> int:
        return sum(self.gaps_C)

    def share(self, rank: int, world: int) -> list[Unit]:
        """The units of one rank, in order."""
        return self.units[rank::world]


def worth(held: Held, vocab_size: int, min_lag: float | None) -> NDArray[np.float64]:
    """Nats per token to be gained from labelling each of N samples; 0: none is needed.

    min_lag: nats from which on a record is stale; None: only gaps count.
    """
    best = held.best
    reference = best if math.isnan(held.teacher_loss) else held.teacher_loss
    lag_N, gain_N = (np.nan_to_num(held.loss_N - loss, nan=0.0) for loss in (best, reference))
    stale_N = held.covered_N & ~held.mine_N & (lag_N >= (math.inf if min_lag is None else min_lag))
    uniform = math.log(vocab_size) - (0.0 if math.isnan(reference) else reference)
    # A gap is filled by any teacher.
    gap = max(uniform, float(gain_N[held.covered_N].max(initial=0.0)), 1e-6)
    return np.where(held.covered_N, np.where(stale_N, gain_N.clip(min=0.0), 0.0), gap)


def make_plan(
    held: Sequence[Held],
    *,
    vocab_size: int,
    flops_per_sample: Sequence[float],
    min_lag: float | None,
    unit_samples: int,
    max_samples: int | None = None,
    max_flops: float | None = None,
) -> Plan:
    """The units of a backfill, the most nats per floating-point operation first.

    Args:
        held: of each corpus.
        vocab_size: V of the teacher.
        flops_per_sample: what labelling a sample of each corpus costs.
        min_lag: nats from which on a record is stale; None: only gaps are filled.
        max_samples, max_flops: budget in all; what the teacher has labelled already has used some of it.
    """
    worth_CN = [worth(part, vocab_size, min_lag) for part in held]
    budgeted = max_samples is not None or max_flops is not None
    units: list[tuple[float, Unit]] = []
    for corpus, (worth_N, cost) in enumerate(zip(worth_CN, flops_per_sample, strict=True)):
        # Of equal worth: without a budget in the order of ids, which is that of the file.
        among = np.random.default_rng(corpus).permutation(len(worth_N)) if budgeted else np.arange(len(worth_N))
        needed = among[worth_N[among] > 0]
        order = needed[np.argsort(-worth_N[needed], kind="stable")]
        for start in range(0, len(order), unit_samples):
            ids = order[start : start + unit_samples]
            gain = float(worth_N[ids].mean())
            units.append((gain / cost, Unit(corpus, ids, gain)))
    units.sort(key=lambda entry: -entry[0])
    done = [int(part.mine_N.sum()) for part in held]
    samples = math.inf if max_samples is None else max_samples - sum(done)
    flops = math.inf if max_flops is None else max_flops - sum(n * c for n, c in zip(done, flops_per_sample))
    needed_in_all = sum(len(unit.sample_ids) for _, unit in units)
    kept = list(_within([unit for _, unit in units], flops_per_sample, samples, flops))
    gaps_C = [0] * len(held)
    for unit in kept:
        gaps_C[unit.corpus] += int((~held[unit.corpus].covered_N[unit.sample_ids]).sum())
    return Plan(kept, gaps_C, needed_in_all - sum(len(unit.sample_ids) for unit in kept))


def _within(units: list[Unit], flops_per_sample: Sequence[float], samples: float, flops: float) -> Iterator[Unit]:
    """The first of the units that a budget covers; the last is cut to it."""
    for unit in units:
        cost = flops_per_sample[unit.corpus]
        room = int(max(0.0, min(samples, flops / cost, len(unit.sample_ids))))
        if room:
            yield unit._replace(sample_ids=np.sort(unit.sample_ids[:room]))
        if room < len(unit.sample_ids):
            return
        samples, flops = samples - room, flops - room * cost
