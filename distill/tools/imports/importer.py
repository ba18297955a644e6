"""Foreign sequences into a cache, through its writer like any other targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from distill.cache.targets import Atoms
from distill.cache.writer import CacheWriter
from distill.config.errors import CacheError
from distill.tools.imports.assemble import Assembler, Whole
from distill.tools.imports.encode import SpanEncoder, Tally
from distill.tools.imports.sequences import ForeignSequence


class Placement(NamedTuple):
    """Positions of a sequence that are positions of the corpus."""

    start: int
    """In the corpus: sample id * S + position in it. May reach over the end of a sample."""
    first: int
    """In the sequence."""
    positions: int
    whole: bool
    """The sequence is a sample; else it is one of its documents."""


class Samples(Protocol):
    """n samples of S tokens and the one after them."""

    @property
    def ids(self) -> NDArray[np.int32]: ...  # [n, S+1]
    @property
    def mask(self) -> NDArray[np.bool_]: ...  # [n, S+1]: may be a label
    @property
    def documents(self) -> NDArray[np.int32]: ...  # [n, S+1]: ordinal within the sample
    @property
    def digests(self) -> NDArray[np.uint64]: ...  # [n]


class Corpus(Protocol):
    """The packed corpus."""

    sample_tokens: int

    def __len__(self) -> int: ...
    def take(self, sample_ids: NDArray[np.int64]) -> Samples: ...


Match = Callable[[ForeignSequence], list[Placement] | None]
"""Where a sequence stands in the corpus; no place: it does not; None: it is left out on purpose."""


@dataclass
class ImportReport:
    """What an import did."""

    sequences: int = 0
    matched: int = 0
    left_out: int = 0
    unmatched: int = 0
    first_unmatched: str = ""
    samples: int = 0
    """Written, those that were in the cache already included."""
    partial: int = 0
    """Samples of which some documents were not found."""
    repeated: int = 0
    """Pieces of positions that had come before."""
    tally: Tally | None = None

    def lines(self) -> list[str]:
        """For people."""
        t = self.tally or Tally()
        lines = [
            f"{self.matched} of {self.sequences} sequences matched; {self.unmatched} did not, {self.left_out} left out",
            f"{self.samples} samples, {self.partial} of them with gaps; {t.tokens} tokens have targets",
            f"label among what was kept for {_share(t.labels_kept, t.tokens)} of them: few mean a wrong alignment",
        ]
        if t.labels_bound:
            lines.append(
                f"label's log-probability of {_share(t.labels_bound, t.tokens)} is an upper bound, from the residual "
                "mass and the smallest kept probability: this teacher's loss reads lower than it is"
            )
        if t.scaled:
            lines.append(f"{t.scaled} tokens had probabilities that sum to up to {t.largest_sum:.3f}: scaled to 1")
        if self.repeated:
            lines.append(f"{self.repeated} pieces came again and were passed over")
        if self.unmatched:
            lines.append(f"the first that did not match: {self.first_unmatched}")
        return lines


def write(
    sequences: Iterable[ForeignSequence],
    match: Match,
    corpus: Corpus,
    writer: CacheWriter,
    encoder: SpanEncoder,
    *,
    teacher: str,
    step: int,
    tokens_seen: int,
    allow_unmatched: bool,
) -> ImportReport:
    """Writes all sequences that `match` finds in the corpus, and closes the writer's stream.

    A sample that is in the cache with this step is passed over, so an import that was cut short goes on when repeated.

    Raises:
        CacheError: a sequence that is not in the corpus, unless allowed; a damaged file; what the writer refuses.
    """
    report = ImportReport(tally=encoder.tally)

    def put(whole: Whole) -> None:
        p, samples = whole.piece, corpus.take(np.array([whole.sample_id]))
        atoms = Atoms(*map(torch.from_numpy, (p.counts_T, p.ids_N, p.codes_N, p.rest_T)))
        writer.put(
            np.array([whole.sample_id]),
            samples.digests,
            atoms,
            p.label_logprob_T,
            p.entropy_T,
            samples.mask[0, 1:] & p.has_T,
            step=step,
            tokens_seen=tokens_seen,
            teacher=teacher,
        )
        report.samples += 1

    with Assembler(corpus.sample_tokens) as assembler:
        for sequence in sequences:
            report.sequences += 1
            runs = match(sequence)
            if runs is None:
                report.left_out += 1
            elif not runs:
                _unmatched(report, sequence, allow_unmatched)
            else:
                report.matched += 1
                for run in runs:
                    for whole in _pieces(sequence, run, corpus, encoder, assembler):
                        put(whole)
        for whole in assembler.rest():
            report.partial += 1
            put(whole)
        report.repeated = assembler.repeated
    if not report.samples:
        raise CacheError(f"none of {report.sequences} sequences is in the corpus; the first: {report.first_unmatched}")
    writer.finish()
    return report


def _unmatched(report: ImportReport, sequence: ForeignSequence, allowed: bool) -> None:
    start = "" if sequence.tokens is None else f" ({len(sequence.tokens)} tokens: {_some(sequence.tokens)})"
    report.unmatched += 1
    report.first_unmatched = report.first_unmatched or f"{sequence.where}{start}"
    if not allowed:
        raise CacheError(
            f"{report.first_unmatched}: neither a sample nor a document of the corpus, after {report.matched} that "
            "are; --allow-unmatched passes over such sequences"
        )


def _share(count: int, total: int) -> str:
    return f"{count} ({100 * count / max(total, 1):.1f} %)"


def _some(tokens: Any) -> str:
    return " ".join(map(str, tokens[:8])) + (" ..." if len(tokens) > 8 else "")


def _pieces(
    sequence: ForeignSequence, run: Placement, corpus: Corpus, encoder: SpanEncoder, assembler: Assembler
) -> Iterable[Whole]:
    """Hands a run to the assembler, sample by sample; yields those that are complete by it."""
    length = corpus.sample_tokens
    start, first, left = run.start, run.first, min(run.positions, len(corpus) * length - run.start)
    while left > 0:
        sample_id, position = divmod(start, length)
        count = min(left, length - position)
        samples = corpus.take(np.array([sample_id]))
        labels_T = samples.ids[0, position + 1 : position + 1 + count].astype(np.int64)
        if sequence.tokens is not None:
            told = sequence.tokens[first + 1 : first + count]
            assert np.array_equal(told, labels_T[: len(told)]), f"{sequence.where}: matched to other tokens"
        useful_T = samples.mask[0, position + 1 : position + 1 + count]
        if useful_T.any() and not assembler.has(sample_id, position, count):
            piece = encoder.piece(sequence, first, labels_T, useful_T, sample_id, position)
            expected = 1 if run.whole else _documents(samples)
            if whole := assembler.add(sample_id, position, piece, expected):
                yield whole
        start, first, left = start + count, first + count, left - count


def _documents(samples: Samples) -> int:
    """How many documents of the one sample have a label in it."""
    return len(np.unique(samples.documents[0, 1:][samples.mask[0, 1:]]))
