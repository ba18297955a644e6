"""Several caches of one corpus, tokenizer, codec and seed into one."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from distill.cache import cataloging
from distill.cache.header import CacheHeader, NoCache
from distill.cache.loss_curve import LossSums
from distill.cache.open_store import open_store
from distill.cache.publish import create
from distill.cache.ranks import invert, load_ranks
from distill.cache.shard import Array
from distill.cache.store import Store
from distill.cache.view import View, open_view, sound_view
from distill.config.paths import home
from distill.config.terminal import advancing
from distill.config.units import file_size, grouped
from distill.tools import common
from distill.tools.repack import NOTHING, Packer, Portion, copies, shards_of
from distill.tools.token_counter import TokenCounter

SAME = ("vocab_size", "tokenizer", "corpus", "sample_tokens", "samples", "codec", "seed", "ranks")
"""What caches must have in common; the teachers' streams may differ."""


class Merge(NamedTuple):
    """What was done."""

    shards: int
    """Published in the target."""
    copied: int
    """Records."""
    passed: int
    """Newest records of the sources that were not copied: the target, or another source, has them or later ones."""
    bytes: int
    """Published."""


def merge(sources: Sequence[Store], target: Store, *, shard_bytes: int) -> Merge:
    """Copies every sample's newest record into `target`, which is made, with the first source's stream, if need be.

    Label losses come along: of a teacher that the target lacks all that the source has seen, of others those of the
    copied records. Of records of a sample the one with the greatest step counts: the target's, then the first source's
    where steps are the same. A second merge finds nothing to do, and one that was stopped goes on where it was.

    Raises:
        CacheError: headers that differ (names every field), damage, another tool at work on the target, or too little
            room on its disk.
    """
    views = [sound_view(open_view(store, CacheHeader.load(store))) for store in sources]
    for view in views[1:]:
        view.header.check(**_common(views[0].header))
    target.make_folders("")
    with common.alone(target):
        header = open_target(target, views[0].store, views[0].header)
        cataloging.update(target, header)
        there = open_view(target, header)
        rules = [_Wins(there, views, number) for number in range(len(views))]
        plans = [shards_of(view, wins) for view, wins in zip(views, rules, strict=True)]
        common.check_room(target, sum(plan.room(there) for plan in plans), "the merge")
        packer = Packer(target, header, "merge", shard_bytes)
        known = set(there.losses.teachers())
        with advancing("merge", sum(int(plan.sizes.sum()) for plan in plans)) as advance:
            for view, wins, plan in zip(views, rules, plans, strict=True):
                counter = TokenCounter(view.store, view.header)
                for part, _ in copies(view, plan.take(np.flatnonzero(plan.kept)), wins):
                    packer.add(part._replace(losses=losses_of(part, known, counter)))
                    advance(part.size)
                # Last, so that a merge that was stopped has none of it, and the next one all.
                packer.add(NOTHING._replace(losses=view.losses.without(known)))
                known.update(view.losses.teachers())
            packer.flush()
        cataloging.update(target, header, is_merging=True)
    copied, covered = sum(int(plan.kept.sum()) for plan in plans), sum(view.covered for view in views)
    return Merge(len(packer.shards), copied, covered - copied, sum(shard.bytes for shard in packer.shards))


class _Wins:
    """For samples and the steps of a source's records, whether these are the ones to copy."""

    def __init__(self, there: View, views: Sequence[View], number: int):
        self._others = [(there, False)]
        """Views, and whether the source's record wins where steps are the same."""
        self._others += [(view, i > number) for i, view in enumerate(views) if i != number]

    def __call__(self, ids: Array, steps: Array) -> Array:
        wins = steps >= 0
        for view, is_later in self._others:
            theirs = view.find(ids).steps
            wins &= theirs <= steps if is_later else theirs < steps
        return wins


def losses_of(part: Portion, teachers: Collection[tuple[str, str]], counter: TokenCounter) -> LossSums:
    """Label losses of the records whose (teacher, source) are among these, as the records have them, within a byte."""
    here = {(origin.teacher, origin.source) for origin in part.origins}
    if here.isdisjoint(teachers):
        return LossSums()
    return counter.sums(part.columns, part.records, part.origins).losses.without(here.difference(teachers))


def _common(header: CacheHeader) -> dict[str, object]:
    return {name: getattr(header, name) for name in SAME}


def open_target(target: Store, source: Store, header: CacheHeader) -> CacheHeader:
    """The target's header, which fits the source's, `header`; made where there is none."""
    try:
        there = CacheHeader.load(target)
    except NoCache:
        # Any counts that fall with the rank.
        counts_V = header.vocab_size - invert(load_ranks(source, header)) if header.ranks else None
        return create(target, header, counts_V)
    there.check(**_common(header))
    return there


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources", nargs="+", metavar="SRC", type=home, help="caches of one corpus, tokenizer, codec and seed"
    )
    common.add_folder(parser, "the cache that gets their records; made if need be")
    common.add_shard_mb(parser)


def run(args: argparse.Namespace) -> int:
    for source in args.sources:
        common.check_distinct(source, args.dir)
    done = merge(
        [open_store(each) for each in args.sources], open_store(args.dir), shard_bytes=common.shard_bytes(args)
    )
    print(
        f"{args.dir}: {grouped(done.copied)} records in {done.shards} new shards of {file_size(done.bytes)}; "
        f"{grouped(done.passed)} were there already, or had a later one"
    )
    return 0
