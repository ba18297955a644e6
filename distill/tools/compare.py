"""Two caches, record by record: the same bytes, or how far apart what they say is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from distill.cache import differ
from distill.cache.reader import CacheReader, Sample
from distill.cache.record import Decoded
from distill.cache.store import Store
from distill.tools.common import Bar

NEEDED = ("vocab_size", "tokenizer", "corpus", "sample_tokens", "samples")
"""Without these in common there is nothing to compare."""
_BLOCK = 64


@dataclasses.dataclass
class Comparison:
    """Counts are of samples, or of tokens where the name says so."""

    headers: list[str] = dataclasses.field(default_factory=list)
    """Fields that differ."""
    only_a: int = 0
    only_b: int = 0
    equal: int = 0
    """Records with the same bytes."""
    different: int = 0
    other_tokens: int = 0
    """Samples whose teachers saw other tokens."""
    other_step: int = 0
    other_teacher: int = 0
    tokens: int = 0
    """Tokens with a target in both."""
    tokens_different: int = 0
    """Of these: another atom, probability, label log-probability or entropy."""
    tokens_one_side: int = 0
    """Tokens with a target in one of the two only."""
    largest_p: float = 0.0
    """Largest difference of a probability."""
    mean_p: float = 0.0
    """Mean difference of a probability, over the atoms of either in tokens that differ."""
    mean_tv: float = 0.0
    """Mean total variation distance, over all `tokens`."""
    largest_tv: float = 0.0
    largest_label: float = 0.0
    """Largest difference of log p(label), nats."""
    largest_entropy: float = 0.0

    def same(self, tolerance: float = 0.0) -> bool:
        """The same samples, tokens and targets; with a tolerance, targets whose mean total variation is within it."""
        if self.only_a or self.only_b or self.other_tokens or self.tokens_one_side:
            return False
        return not self.different if tolerance == 0 else self.mean_tv <= tolerance


def compare(store_a: Store, store_b: Store) -> Comparison:
    """Compares the newest records of all samples.

    Raises:
        CacheError: caches of different corpora, tokenizers or shapes, or damage.
    """
    a, b = CacheReader(store_a.root), CacheReader(store_b.root)
    b.header.check(**{name: getattr(a.header, name) for name in NEEDED})
    found = Comparison()
    mine, other = a.header.json(), b.header.json()
    found.headers = [f"{name}: {differ.shown(a)}, {differ.shown(b)}" for name, a, b in differ.pairs(mine, other)]
    sums = [0.0, 0.0, 0]
    block = 1 << 20
    for first in range(0, a.header.samples, block):
        ids = np.arange(first, min(first + block, a.header.samples))
        in_a, in_b = a.covers(ids), b.covers(ids)
        found.only_a += int((in_a & ~in_b).sum())
        found.only_b += int((in_b & ~in_a).sum())
    with Bar("compare", sum(row.bytes for row in a.rows)) as bar:
        for group in _groups(a.samples()):
            bar.add(sum(len(sample.data) for sample in group))
            theirs = b.records(np.array([sample.sample_id for sample in group]))
            pairs = [(x, y) for x, y in zip(group, theirs, strict=True) if y is not None]
            _differ(a, b, pairs, found, sums)
    found.mean_tv = sums[0] / max(found.tokens, 1)
    found.mean_p = sums[1] / max(sums[2], 1)
    return found


def _groups(samples: Iterator[Sample]) -> Iterator[list[Sample]]:
    while group := list(islice(samples, _BLOCK)):
        yield group


def _differ(
    a: CacheReader, b: CacheReader, pairs: Sequence[tuple[Sample, Sample]], found: Comparison, sums: list[float]
) -> None:
    same_codec = a.header.codec == b.header.codec and a.header.ranks == b.header.ranks
    for x, y in pairs:
        found.other_step += x.step != y.step
        found.other_teacher += x.origin.teacher != y.origin.teacher
        found.other_tokens += x.digest != y.digest
    equal = [same_codec and x.data == y.data for x, y in pairs]
    found.equal += sum(equal)
    found.different += len(pairs) - sum(equal)
    alike = [x for (x, _), same in zip(pairs, equal, strict=True) if same]
    if alike:
        found.tokens += int(a.decode(alike).valid_T.sum())
    apart = [pair for pair, same in zip(pairs, equal, strict=True) if not same]
    if apart:
        _measure(a, b, a.decode([x for x, _ in apart]), b.decode([y for _, y in apart]), found, sums)


def _measure(a: CacheReader, b: CacheReader, x: Decoded, y: Decoded, found: Comparison, sums: list[float]) -> None:
    valid_x, valid_y = x.valid_T.numpy(), y.valid_T.numpy()
    both = valid_x & valid_y
    found.tokens += int(both.sum())
    found.tokens_one_side += int((valid_x != valid_y).sum())
    # One number for each (token, id): what a says less what b says.
    keys, values = [], []
    for reader, decoded, sign in ((a, x, 1.0), (b, y, -1.0)):
        counts = decoded.atoms.counts_T.numpy().astype(np.int64)
        row = np.repeat(np.arange(len(counts)), counts)
        keep = both[row]
        keys.append((row * reader.header.vocab_size + decoded.atoms.ids_N.numpy())[keep])
        values.append(sign * reader.codec.probs(decoded.atoms).double().numpy()[keep])
    key, place = np.unique(np.concatenate(keys), return_inverse=True)
    apart = np.abs(np.bincount(place, np.concatenate(values), len(key)))
    tv = np.bincount(key // a.header.vocab_size, apart / 2, len(both))
    label = np.abs((x.label_logprob_T - y.label_logprob_T).numpy())[both]
    entropy = np.abs((x.entropy_T - y.entropy_T).numpy())[both]
    differs = (tv[both] > 0) | (label > 0) | (entropy > 0)
    found.tokens_different += int(differs.sum())
    found.largest_p = max(found.largest_p, float(apart.max(initial=0)))
    found.largest_tv = max(found.largest_tv, float(tv.max(initial=0)))
    found.largest_label = max(found.largest_label, float(label.max(initial=0)))
    found.largest_entropy = max(found.largest_entropy, float(entropy.max(initial=0)))
    in_differing = (tv > 0)[key // a.header.vocab_size]
    sums[0] += float(tv.sum())
    sums[1] += float(apart[in_differing].sum())
    sums[2] += int(in_differing.sum())
