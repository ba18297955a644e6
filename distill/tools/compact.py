"""Many shards into few: the newest record of each sample, copied as bytes, in the order of the teacher's steps.

That order, not that of ids, is the one in which students come back to the records. Shards that are large enough and
hold nothing superseded stay as they are, so that the work goes with what has come since the last time. The last thing
written is the row that retires what was copied: whatever stops the work before leaves records twice, which do no
harm, and which the next compaction takes away. Rows that appear meanwhile are not touched.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from distill.cache.format import SHARDS
from distill.cache.header import CacheHeader
from distill.cache.ledger import Retired, ShardRow
from distill.cache.shard import Array, Shard
from distill.cache.store import Store
from distill.cache.view import Newest, open_shard, published
from distill.tools.common import Bar, ToolLedger, alone, remove_leftovers
from distill.tools.decoding import Decoding
from distill.tools.repack import Packer, piece


class Compaction(NamedTuple):
    """What was done."""

    before: int
    """Shards that count, before and after."""
    after: int
    copied: int
    """Records."""
    dropped: int
    """Records that later ones had superseded."""
    bytes_before: int
    """Of shards that count."""
    bytes_after: int
    purged: int
    """Bytes of replaced files that were removed."""
    waiting: int
    """Bytes of replaced files that are still there."""


def compact(store: Store, *, shard_bytes: int, purge: bool = False) -> Compaction:
    """Compacts one cache in its place.

    shard_bytes: of records in a shard; memory is about three times as much. purge: remove the files of retired rows;
    who reads an older view then gets a CacheError.

    Raises:
        CacheError: damage (then nothing is retired), another tool at work, or a file that cannot be written.
    """
    header = CacheHeader.read(store)
    with alone(store) as is_alone:
        rows, retired = published(store, header)
        if is_alone:
            remove_leftovers(store, {row.shard for row in rows + retired})
        chosen, keep = _choose(store, header, rows, shard_bytes)
        packed: list[ShardRow] = []
        copied = sum(len(keep[row.shard]) for row in chosen)
        if chosen:
            packed = _copy(store, header, chosen, keep, shard_bytes)
        purged, waiting = _purge(store, header, purge)
    replaced = {row.shard for row in chosen}
    after = [row for row in rows if row.shard not in replaced] + packed
    return Compaction(
        before=len(rows),
        after=len(after),
        copied=copied,
        dropped=sum(row.samples for row in chosen) - copied,
        bytes_before=sum(row.bytes for row in rows),
        bytes_after=sum(row.bytes for row in after),
        purged=purged,
        waiting=waiting,
    )


def in_order(rows: Iterable[ShardRow]) -> list[ShardRow]:
    """As a student meets them: by step."""
    return sorted(rows, key=lambda row: (min((o.first_step for o in row.origins), default=0), row.writer, row.seq))


def _choose(
    store: Store, header: CacheHeader, rows: list[ShardRow], shard_bytes: int
) -> tuple[list[ShardRow], dict[str, Array]]:
    """Shards to replace, in the order of steps, and the places in each whose records stay."""
    newest = Newest(header.samples)
    for row in rows:
        columns = open_shard(store, header, row).columns
        newest.add(columns.sample_ids, columns.steps)
    chosen, keep = [], {}
    for number, row in enumerate(rows):
        places = newest.of(number, open_shard(store, header, row).columns.sample_ids)
        if len(places) < row.samples or row.bytes - row.index_bytes < shard_bytes / 2:
            chosen.append(row)
            keep[row.shard] = places
    if len(chosen) == 1 and len(keep[chosen[0].shard]) == chosen[0].samples:
        return [], {}  # the rest of an earlier compaction, alone
    return in_order(chosen), keep


def _copy(
    store: Store, header: CacheHeader, chosen: list[ShardRow], keep: dict[str, Array], shard_bytes: int
) -> list[ShardRow]:
    decoding = Decoding(store, header)
    ledger = ToolLedger(store, "compact", header.identity)
    packer = Packer(ledger, shard_bytes)
    with Bar("compact", sum(row.bytes for row in chosen)) as bar:
        for row in chosen:
            if len(keep[row.shard]):
                shard = Shard(store, row)
                packer.add(piece(shard, shard.span(0, row.samples), keep[row.shard], decoding.tokens))
            bar.add(row.bytes)
        packer.flush()
    ledger.get().retire(runs(chosen))
    return packer.rows


def runs(rows: Iterable[ShardRow]) -> list[Retired]:
    """The rows as few ranges."""
    found: list[Retired] = []
    for writer, seq in sorted((row.writer, row.seq) for row in rows):
        if found and (found[-1].ledger, found[-1].last + 1) == (writer, seq):
            found[-1] = Retired(writer, found[-1].first, seq)
        else:
            found.append(Retired(writer, seq, seq))
    return found


def _purge(store: Store, header: CacheHeader, purge: bool) -> tuple[int, int]:
    """Bytes of retired rows' files that were removed, and that are there."""
    there, sizes = set(store.names(SHARDS)), [0, 0]
    for row in published(store, header).retired:
        if row.shard in there:
            sizes[not purge] += row.bytes
            if purge:
                store.remove(f"{SHARDS}/{row.shard}")
    return sizes[0], sizes[1]
