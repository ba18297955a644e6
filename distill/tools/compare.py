"""Two caches, record by record: the same bytes, or how far apart their targets are."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from distill.cache.differ import shown
from distill.cache.open_store import open_store
from distill.cache.store import Store
from distill.config import json_text
from distill.config.errors import ConfigError
from distill.config.paths import home
from distill.config.terminal import advancing
from distill.config.units import grouped
from distill.config.values import differences
from distill.tools.common import add_json

if TYPE_CHECKING:
    from distill.cache.reader import CacheReader, Sample

NEEDED = ("vocab_size", "tokenizer", "corpus", "sample_tokens", "samples")
"""Without these in common there is nothing to compare."""
_BLOCK, _IDS = 64, 1 << 20
"""Samples decoded, and ids looked up, at one time."""


@dataclasses.dataclass
class Comparison:
    """How two caches differ; counts are of samples, or of tokens where the name has them."""

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


class _Sums:
    """Behind the means of a comparison."""

    def __init__(self) -> None:
        self.tv = self.apart = 0.0
        self.atoms = 0


def compare(store_a: Store, store_b: Store) -> Comparison:
    """Compares the newest records of all samples.

    Raises:
        CacheError: caches of different corpora, tokenizers or shapes, or damage.
    """
    from distill.cache.reader import CacheReader

    a, b = CacheReader(store_a.root), CacheReader(store_b.root)
    b.header.check(**{name: getattr(a.header, name) for name in NEEDED})
    result, sums = Comparison(), _Sums()
    headers = differences(a.header.json(), b.header.json())
    result.headers = [f"{key}: {shown(key, in_a)}, {shown(key, in_b)}" for key, in_a, in_b in headers]
    for first in range(0, a.header.samples, _IDS):
        ids = np.arange(first, min(first + _IDS, a.header.samples))
        in_a, in_b = a.covers(ids), b.covers(ids)
        result.only_a += int((in_a & ~in_b).sum())
        result.only_b += int((in_b & ~in_a).sum())
    samples = a.samples()
    with advancing("compare", int(a.stats()["samples"]), grouped) as advance:
        while group := list(islice(samples, _BLOCK)):
            advance(len(group))
            theirs = b.records(np.array([sample.sample_id for sample in group]))
            both = [(x, y) for x, y in zip(group, theirs, strict=True) if y is not None]
            _compare_records(a, b, both, result, sums)
    result.mean_tv = sums.tv / max(result.tokens, 1)
    result.mean_p = sums.apart / max(sums.atoms, 1)
    return result


def _compare_records(
    a: CacheReader, b: CacheReader, pairs: Sequence[tuple[Sample, Sample]], result: Comparison, sums: _Sums
) -> None:
    same_codec = a.header.codec == b.header.codec and a.header.ranks == b.header.ranks
    for x, y in pairs:
        result.other_step += x.step != y.step
        result.other_teacher += x.origin.teacher != y.origin.teacher
        result.other_tokens += x.digest != y.digest
    equal = [x for x, y in pairs if same_codec and x.data == y.data]
    apart = [(x, y) for x, y in pairs if not (same_codec and x.data == y.data)]
    result.equal += len(equal)
    result.different += len(apart)
    if equal:
        result.tokens += int(a.decode(equal).valid_T.sum())
    if not apart:
        return
    decoded_a, decoded_b = a.decode([x for x, _ in apart]), b.decode([y for _, y in apart])
    valid_a, valid_b = decoded_a.valid_T.numpy(), decoded_b.valid_T.numpy()
    both = valid_a & valid_b
    result.tokens += int(both.sum())
    result.tokens_one_side += int((valid_a != valid_b).sum())
    # One number for each (token, id): the probability in a less that in b.
    keys, values = [], []
    for reader, decoded, sign in ((a, decoded_a, 1.0), (b, decoded_b, -1.0)):
        counts = decoded.atoms.counts_T.numpy().astype(np.int64)
        row = np.repeat(np.arange(len(counts)), counts)
        keep = both[row]
        keys.append((row * reader.header.vocab_size + decoded.atoms.ids_N.numpy())[keep])
        values.append(sign * reader.codec.probs(decoded.atoms).double().numpy()[keep])
    key, place = np.unique(np.concatenate(keys), return_inverse=True)
    distance = np.abs(np.bincount(place, np.concatenate(values), len(key)))
    tv = np.bincount(key // a.header.vocab_size, distance / 2, len(both))
    label = np.abs((decoded_a.label_logprob_T - decoded_b.label_logprob_T).numpy())[both]
    entropy = np.abs((decoded_a.entropy_T - decoded_b.entropy_T).numpy())[both]
    differs = (tv[both] > 0) | (label > 0) | (entropy > 0)
    result.tokens_different += int(differs.sum())
    result.largest_p = max(result.largest_p, float(distance.max(initial=0)))
    result.largest_tv = max(result.largest_tv, float(tv.max(initial=0)))
    result.largest_label = max(result.largest_label, float(label.max(initial=0)))
    result.largest_entropy = max(result.largest_entropy, float(entropy.max(initial=0)))
    in_differing = (tv > 0)[key // a.header.vocab_size]
    sums.tv += float(tv.sum())
    sums.apart += float(distance[in_differing].sum())
    sums.atoms += int(in_differing.sum())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", type=home, help="a cache")
    parser.add_argument("b", metavar="B", type=home, help="another one of the same corpus")
    add_json(parser)
    parser.add_argument(
        "--tolerance", type=float, default=0.0, metavar="TV",
        help="equal all the same if the mean total variation distance of a token is at most this (%(default)s)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    if not 0 <= args.tolerance <= 1:
        raise ConfigError(f"--tolerance is {args.tolerance}; allowed is 0 to 1")
    result = compare(open_store(args.a), open_store(args.b))
    same = result.same(args.tolerance)
    if args.json:
        print(json_text.dumps(dataclasses.asdict(result) | {"same": same}))
    else:
        print("\n".join(_lines(result)))
        print("equal" if same and not result.different else "equal within the tolerance" if same else "different")
    return 0 if same else 1


def _lines(result: Comparison) -> list[str]:
    r = result
    lines = [f"header: {line}" for line in r.headers]
    lines.append(f"samples in A alone: {r.only_a}; in B alone: {r.only_b}")
    lines.append(f"records of the same bytes: {r.equal}; of others: {r.different}")
    if r.other_tokens:
        lines.append(f"samples of other tokens: {r.other_tokens}")
    if r.other_step or r.other_teacher:
        lines.append(f"records of another step: {r.other_step}; of another teacher: {r.other_teacher} (not compared)")
    if r.different:
        lines += [
            f"tokens that differ: {r.tokens_different} of {r.tokens}; with a target in one alone: {r.tokens_one_side}",
            f"probabilities: largest difference {r.largest_p:.6f}, mean {r.mean_p:.6f} over atoms of tokens that "
            "differ",
            f"total variation: mean {r.mean_tv:.6f} over all tokens, largest {r.largest_tv:.6f}",
            f"log p(label): largest difference {r.largest_label:.4f}; entropy: {r.largest_entropy:.4f} nats",
        ]
    return lines
