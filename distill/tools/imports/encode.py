"""Foreign distributions of consecutive positions as what a cache stores of them."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from distill.cache.codecs import Codec
from distill.cache.codecs.topk import TopK
from distill.cache.format import LABEL_TOP
from distill.cache.targets import Atoms
from distill.config.errors import CacheError
from distill.tools.imports.sequences import ForeignSequence

_TOO_MUCH = 1.05
"""Mean sum of a sequence's kept probabilities that cannot be one of probabilities: rounding and fitting give single
positions more, but not a whole sequence."""
_REPORTED = 1.01


@dataclass
class ImportReport:
    """What an import did."""

    tokens: int = 0
    """That got a target."""
    labels_kept: int = 0
    """Tokens whose label is among the entries."""
    labels_bound: int = 0
    """Tokens whose label's log-probability is only known to be below a bound."""
    scaled: int = 0
    """Tokens whose kept probabilities summed to more than 1.01 and were scaled to 1."""
    largest_sum: float = 0.0
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
    """Spans of positions that had come before."""

    def lines(self) -> list[str]:
        """For people."""
        lines = [
            f"{self.matched} of {self.sequences} sequences matched; {self.unmatched} did not, {self.left_out} left out",
            f"{self.samples} samples, {self.partial} of them with gaps; {self.tokens} tokens have targets",
            f"label among what was kept for {self._share(self.labels_kept)} of them: few mean a wrong alignment",
        ]
        if self.labels_bound:
            lines.append(
                f"label's log-probability of {self._share(self.labels_bound)} is an upper bound, from the residual "
                "mass and the smallest kept probability: this teacher's loss reads lower than it is"
            )
        if self.scaled:
            lines.append(
                f"{self.scaled} tokens had probabilities that sum to up to {self.largest_sum:.3f}: scaled to 1"
            )
        if self.repeated:
            lines.append(f"{self.repeated} pieces came again and were passed over")
        if self.unmatched:
            lines.append(f"the first that did not match: {self.first_unmatched}")
        return lines

    def _share(self, count: int) -> str:
        return f"{count} ({100 * count / max(self.tokens, 1):.1f} %)"


class Span(NamedTuple):
    """Consecutive positions of a sample: the columns of `Atoms`, and those that `CacheWriter.put` takes besides."""

    counts_T: NDArray[np.int32]
    ids_N: NDArray[np.int32]
    codes_N: NDArray[np.int32]
    rest_T: NDArray[np.uint8]
    label_logprob_T: NDArray[np.float32]
    entropy_T: NDArray[np.float32]
    has_T: NDArray[np.bool_]
    """The source has a distribution."""


class SpanEncoder:
    """Encodes with one codec: `topk` for entries, any codec for whole distributions.

    Of entries the label's log-probability is exact where the label is among them, or the source holds it apart;
    otherwise the bound min(residual mass, smallest kept probability) is taken for it, which is never below it. The
    entropy is that of the entries and of the residual as one lump, which is never above it.
    """

    def __init__(self, codec: Codec, vocab_size: int, seed: int):
        self._codec, self._vocab_size, self._seed = codec, vocab_size, seed
        self.report = ImportReport()

    def span(
        self, sequence: ForeignSequence, first: int, labels_T: NDArray[np.int64], valid_T: NDArray[np.bool_],
        sample_id: int, position: int,
    ) -> Span:  # fmt: skip
        """Positions `first` and on of a sequence, one for each label, which are `position` and on of a sample.

        valid_T: labels that count.

        Raises:
            CacheError: ids beyond the vocabulary, or values that are no probabilities.
        """
        if sequence.dense_PV is not None:
            span = self._whole(sequence, first, labels_T, valid_T, sample_id, position)
        else:
            span = self._sparse(sequence, first, labels_T, valid_T)
        if not (np.isfinite(span.label_logprob_T) & np.isfinite(span.entropy_T)).all():
            raise CacheError(f"{sequence.where}: a distribution is not finite")
        return span

    def _sparse(self, sequence: ForeignSequence, first: int, labels_T: Any, valid_T: Any) -> Span:
        assert isinstance(self._codec, TopK) and sequence.entries is not None
        e, tokens = sequence.entries, len(labels_T)
        before = np.concatenate([[0], np.cumsum(e.counts_P)])
        start, stop = int(before[first]), int(before[first + tokens])
        counts_T, ids_N = e.counts_P[first : first + tokens], e.ids_N[start:stop]
        if len(ids_N) and ids_N.max() >= self._vocab_size:
            raise CacheError(f"{sequence.where}: id {ids_N.max()}; the vocabulary has {self._vocab_size} ids")
        token_N = np.repeat(np.arange(tokens), counts_T)
        probs_N = np.exp(e.logprobs_N[start:stop])
        has_T = counts_T > 0
        sum_T = np.bincount(token_N, probs_N, minlength=tokens)
        self._check_sums(sequence, sum_T[has_T & valid_T])
        probs_N = probs_N / np.maximum(sum_T, 1.0)[token_N]
        rest_T = np.where(has_T, np.clip(1.0 - sum_T, 0.0, 1.0), 0.0)

        with np.errstate(divide="ignore", invalid="ignore"):
            log_N, log_rest_T = np.log(probs_N), np.log(rest_T)
            entropy_T = -np.bincount(token_N, np.where(probs_N > 0, probs_N * log_N, 0.0), minlength=tokens)
            entropy_T -= np.where(rest_T > 0, rest_T * log_rest_T, 0.0)
        least_T = np.full(tokens, np.inf)
        np.minimum.at(least_T, token_N, log_N)
        label_T = np.minimum(log_rest_T, least_T)
        known_T = np.zeros(tokens, np.bool_)
        if sequence.label_logprobs_P is not None:
            given_T = sequence.label_logprobs_P[first : first + tokens]
            known_T = ~np.isnan(given_T)
            label_T = np.where(known_T, given_T, label_T)
        is_label_N = ids_N == labels_T[token_N]
        label_T[token_N[is_label_N]] = log_N[is_label_N]
        kept_T = np.zeros(tokens, np.bool_)
        kept_T[token_N[is_label_N]] = True
        self._count(has_T & valid_T, kept_T, ~kept_T & ~known_T)
        atoms = self._codec.entries(*(torch.from_numpy(np.array(x)) for x in (counts_T, ids_N, probs_N, rest_T)))
        label_T = np.where(has_T, np.clip(label_T, -LABEL_TOP, 0.0), 0.0)
        return _span(atoms, label_T, np.maximum(entropy_T, 0.0), has_T)

    def _whole(
        self, sequence: ForeignSequence, first: int, labels_T: Any, valid_T: Any, sample_id: int, position: int
    ) -> Span:
        assert sequence.dense_PV is not None
        values_TV = sequence.dense_PV[first : first + len(labels_T)]
        width = values_TV.shape[1]
        if width > self._vocab_size:
            raise CacheError(f"{sequence.where}: {width} values a token; the vocabulary has {self._vocab_size} ids")
        # Ids beyond the teacher's vocabulary have no probability.
        values_TV = np.pad(values_TV, ((0, 0), (0, self._vocab_size - width)), constant_values=-np.inf)
        logits_TV, labels = torch.from_numpy(values_TV), torch.from_numpy(labels_T)
        lse_T = logits_TV.logsumexp(-1)
        selection = self._codec.select(
            logits_TV,
            lse_T,
            seed=self._seed,
            sample_ids_T=torch.full_like(labels, sample_id),
            positions_T=torch.arange(position, position + len(labels)),
        )
        label_T = (logits_TV.gather(1, labels[:, None]).squeeze(1) - lse_T).clamp(-LABEL_TOP, 0.0).numpy()
        has_T = np.ones(len(labels), np.bool_)
        self._count(valid_T, has_T, ~has_T)
        return _span(selection.atoms, label_T, selection.entropy_T.clamp(min=0.0).numpy(), has_T)

    def _count(self, has_T: Any, kept_T: Any, bound_T: Any) -> None:
        self.report.tokens += int(has_T.sum())
        self.report.labels_kept += int((has_T & kept_T).sum())
        self.report.labels_bound += int((has_T & bound_T).sum())

    def _check_sums(self, sequence: ForeignSequence, sum_T: Any) -> None:
        if not len(sum_T):
            return
        if sum_T.mean() > _TOO_MUCH:
            raise CacheError(
                f"{sequence.where}: kept probabilities sum to {sum_T.mean():.3g} on average; they are not those of "
                "log-probabilities over the whole vocabulary"
            )
        self.report.scaled += int((sum_T > _REPORTED).sum())
        self.report.largest_sum = max(self.report.largest_sum, float(sum_T.max()))


def _span(atoms: Atoms, label_T: Any, entropy_T: Any, has_T: Any) -> Span:
    counts_T, ids_N, codes_N, rest_T = (column.numpy() for column in atoms)
    return Span(counts_T, ids_N, codes_N, rest_T, label_T.astype(np.float32), entropy_T.astype(np.float32), has_T)
