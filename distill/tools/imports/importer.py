"""Foreign sequences into a cache, through its writer like any other targets."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from distill.cache.targets import Atoms
from distill.cache.writer import CacheWriter
from distill.config.errors import CacheError
from distill.data.packed import PackedCorpus
from distill.tools.imports.assemble import Assembler, WholeSample
from distill.tools.imports.encode import ImportReport, SpanEncoder
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


Match = Callable[[ForeignSequence], list[Placement] | None]
"""Places of a sequence in the corpus; an empty list: it is not there; None: it is left out on purpose."""


def write(
    sequences: Iterable[ForeignSequence], match: Match, corpus: PackedCorpus, writer: CacheWriter, encoder: SpanEncoder,
    *, teacher: str, step: int, tokens_seen: int, allow_unmatched: bool,
) -> ImportReport:  # fmt: skip
    """Writes all sequences that `match` finds in the corpus, and closes the writer's stream; returns `encoder.report`.

    A sample that is in the cache with this step is passed over, so an import that was cut short goes on when repeated.

    Raises:
        CacheError: a sequence that is not in the corpus, unless allowed; a damaged file; what the writer raises.
    """
    report = encoder.report

    def put(whole: WholeSample) -> None:
        ids, span = np.array([whole.sample_id]), whole.span
        samples = corpus.take(ids)
        atoms = Atoms(*map(torch.from_numpy, (span.counts_T, span.ids_N, span.codes_N, span.rest_T)))
        writer.put(
            ids, samples.digests, atoms, span.label_logprob_T, span.entropy_T, samples.mask[0, 1:] & span.has_T,
            step=step, tokens_seen=tokens_seen, teacher=teacher,
        )  # fmt: skip
        report.samples += 1

    with Assembler(corpus.sample_tokens) as assembler:
        for sequence in sequences:
            report.sequences += 1
            placements = match(sequence)
            report.left_out += placements is None
            if placements == []:
                _note_unmatched(report, sequence, allow_unmatched)
            report.matched += bool(placements)
            for placement in placements or ():
                for whole in _samples(sequence, placement, corpus, encoder, assembler):
                    put(whole)
        for whole in assembler.rest():
            report.partial += 1
            put(whole)
        report.repeated = assembler.repeated
    if not report.samples:
        raise CacheError(f"none of {report.sequences} sequences is in the corpus; the first: {report.first_unmatched}")
    writer.finish()
    return report


def _note_unmatched(report: ImportReport, sequence: ForeignSequence, allowed: bool) -> None:
    report.unmatched += 1
    if not report.first_unmatched:
        tokens = [] if sequence.tokens is None else sequence.tokens.tolist()
        some = " ".join(map(str, tokens[:8])) + (" ..." if len(tokens) > 8 else "")
        report.first_unmatched = sequence.where + (f" ({len(tokens)} tokens: {some})" if tokens else "")
    if not allowed:
        raise CacheError(
            f"{report.first_unmatched}: neither a sample nor a document of the corpus, after {report.matched} that "
            "are; --allow-unmatched passes over such sequences"
        )


def _samples(
    sequence: ForeignSequence, placement: Placement, corpus: PackedCorpus, encoder: SpanEncoder, assembler: Assembler
) -> Iterator[WholeSample]:
    """Adds a sequence to the samples on which it lies; yields those that are complete by it."""
    length = corpus.sample_tokens
    start, first = placement.start, placement.first
    end = min(start + placement.positions, len(corpus) * length)
    while start < end:
        sample_id, position = divmod(start, length)
        count = min(end - start, length - position)
        samples = corpus.take(np.array([sample_id]))
        here = slice(position + 1, position + 1 + count)
        labels_T, valid_T = samples.ids[0, here].astype(np.int64), samples.mask[0, here]
        if sequence.tokens is not None:
            theirs = sequence.tokens[first + 1 : first + count]
            assert np.array_equal(theirs, labels_T[: len(theirs)]), f"{sequence.where}: matched to other tokens"
        if valid_T.any() and not assembler.has(sample_id, position, count):
            span = encoder.span(sequence, first, labels_T, valid_T, sample_id, position)
            # Each of its documents with a label comes by itself.
            documents = np.unique(samples.documents[0, 1:][samples.mask[0, 1:]])
            if whole := assembler.add(sample_id, position, span, 1 if placement.whole else len(documents)):
                yield whole
        start, first = start + count, first + count
