"""Several caches of one corpus, tokenizer, codec and seed into one."""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from distill.cache.header import CacheHeader
from distill.cache.open_store import open_store
from distill.cache.publish import create
from distill.cache.ranks import invert, load_ranks
from distill.cache.store import Store
from distill.cache.view import open_shard, published
from distill.config.errors import CacheError
from distill.config.paths import home
from distill.config.terminal import advancing
from distill.config.units import file_size, grouped
from distill.tools import common
from distill.tools.repack import Packer, in_order, portion
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


class _MergedCache:
    """A source or the target, and which of its records count."""

    def __init__(self, store: Store):
        self.store, self.header = store, CacheHeader.load(store)
        self.rows, retired = published(store, self.header)
        self.files = {row.shard for row in self.rows + retired}
        self.newest = common.newest_records(store, self.header, self.rows)


def merge(sources: Sequence[Store], target: Store, *, shard_bytes: int) -> Merge:
    """Copies every sample's newest record into `target`, which is made, with the first source's stream, if need be.

    Of records of a sample the one with the greatest step counts: the target's, then the first source's where steps are
    the same. A second merge finds nothing to do, and one that was stopped goes on where it was.

    Raises:
        CacheError: headers that differ (names every field), damage, another tool at work on the target.
    """
    caches = [_MergedCache(store) for store in sources]
    for cache in caches[1:]:
        cache.header.check(**_common(caches[0].header))
    target.make_folders("")
    with common.alone(target) as is_alone:
        header = _open(target, caches[0])
        there = _MergedCache(target)
        if is_alone:
            common.remove_leftovers(target, there.files)
        packer = Packer(target, "merge", header.identity, shard_bytes)
        copied = passed = 0
        with advancing("merge", sum(row.bytes for cache in caches for row in cache.rows)) as advance:
            for number, cache in enumerate(caches):
                counter = TokenCounter(cache.store, cache.header)
                place = {row.shard: i for i, row in enumerate(cache.rows)}
                for row in in_order(cache.rows):
                    shard = open_shard(cache.store, cache.header, row)
                    newest = cache.newest.of(place[row.shard], shard.columns.sample_ids)
                    ids, steps = shard.columns.sample_ids[newest], shard.columns.steps[newest]
                    # An earlier source wins at equal steps, and so does the target.
                    wins = there.newest.steps(ids) < steps
                    for other in caches[:number]:
                        wins &= other.newest.steps(ids) < steps
                    for other in caches[number + 1 :]:
                        wins &= other.newest.steps(ids) <= steps
                    keep = newest[np.flatnonzero(wins)]
                    copied, passed = copied + len(keep), passed + len(newest) - len(keep)
                    if len(keep):
                        packer.add(portion(shard, shard.span(0, row.samples), keep, counter))
                    advance(row.bytes)
            packer.flush()
    return Merge(len(packer.rows), copied, passed, sum(row.bytes for row in packer.rows))


def _common(header: CacheHeader) -> dict[str, object]:
    return {name: getattr(header, name) for name in SAME}


def _open(target: Store, source: _MergedCache) -> CacheHeader:
    """The target's header, which fits the source's; made where there is none."""
    try:
        there = CacheHeader.load(target)
    except CacheError as error:
        if "no cache here" not in str(error):
            raise
        ids_by_rank = load_ranks(source.store, source.header)
        counts_V = source.header.vocab_size - invert(ids_by_rank)  # any counts that fall with the rank
        return create(target, source.header, counts_V)
    there.check(**_common(source.header))
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
