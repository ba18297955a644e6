"""Several caches of one corpus, tokenizer, codec and seed into one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from distill.cache.header import CacheHeader
from distill.cache.publish import create
from distill.cache.ranks import invert, load_ranks
from distill.cache.store import Store
from distill.cache.view import Newest, open_shard, published
from distill.config.errors import CacheError
from distill.tools.common import Bar, ToolLedger, alone, remove_leftovers
from distill.tools.compact import in_order
from distill.tools.decoding import Decoding
from distill.tools.repack import Packer, piece

SAME = ("vocab_size", "tokenizer", "corpus", "sample_tokens", "samples", "codec", "seed")
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


class _Source:
    def __init__(self, store: Store):
        self.store, self.header = store, CacheHeader.read(store)
        self.rows, retired = published(store, self.header)
        self.files = {row.shard for row in self.rows + retired}
        self.newest = Newest(self.header.samples)
        for row in self.rows:
            columns = open_shard(store, self.header, row).columns
            self.newest.add(columns.sample_ids, columns.steps)


def merge(sources: Sequence[Store], target: Store, *, shard_bytes: int) -> Merge:
    """Copies every sample's newest record into `target`, which is made, with the first source's stream, if need be.

    Of records of a sample the one with the greatest step counts: the target's, then the first source's where steps are
    the same. A second merge finds nothing to do, and one that was stopped goes on where it was.

    Raises:
        CacheError: headers that differ (names every field), damage, another tool at work on the target.
    """
    found = [_Source(store) for store in sources]
    first = found[0].header
    for other in found[1:]:
        other.header.check(**{name: getattr(first, name) for name in (*SAME, "ranks")})
    target.make_folders("")
    with alone(target) as is_alone:
        header = _open(target, found[0])
        there = _Source(target)
        if is_alone:
            remove_leftovers(target, there.files)
        packer = Packer(ToolLedger(target, "merge", header.identity), shard_bytes)
        copied = passed = 0
        with Bar("merge", sum(row.bytes for source in found for row in source.rows)) as bar:
            for number, source in enumerate(found):
                decoding = Decoding(source.store, source.header)
                place = {row.shard: i for i, row in enumerate(source.rows)}
                for row in in_order(source.rows):
                    shard = open_shard(source.store, source.header, row)
                    newest = source.newest.of(place[row.shard], shard.columns.sample_ids)
                    ids, steps = shard.columns.sample_ids[newest], shard.columns.steps[newest]
                    wins = there.newest.steps(ids) < steps
                    for other_number, other in enumerate(found):
                        if other is not source:
                            theirs = other.newest.steps(ids)
                            wins &= (steps > theirs) | ((steps == theirs) & (number < other_number))
                    keep = newest[np.flatnonzero(wins)]
                    copied, passed = copied + len(keep), passed + len(newest) - len(keep)
                    if len(keep):
                        packer.add(piece(shard, shard.span(0, row.samples), keep, decoding.tokens))
                    bar.add(row.bytes)
            packer.flush()
    return Merge(len(packer.rows), copied, passed, sum(row.bytes for row in packer.rows))


def _open(target: Store, source: _Source) -> CacheHeader:
    """The target's header, which fits the source's."""
    header = source.header
    ids_by_rank = load_ranks(source.store, header)
    try:
        there = CacheHeader.read(target)
    except CacheError as error:
        if "no cache here" not in str(error):
            raise
        counts_V = header.vocab_size - invert(ids_by_rank)  # any counts that fall with the rank
        return create(target, header, counts_V)
    there.check(**{name: getattr(header, name) for name in SAME})
    if not np.array_equal(load_ranks(target, there), ids_by_rank):
        raise CacheError(
            f"cache {target.root} does not fit: its table of ranks is another than that of {source.store.root}"
        )
    return there
