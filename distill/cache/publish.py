"""Creation of a cache, and publication of shards and marks in it. No torch."""

import dataclasses
from collections.abc import Sequence

from distill.cache.format import CATALOG, HEADER, LOCKS, SHARDS, TEMPORARY, group_name, ranks_name, shard_name
from distill.cache.header import CacheHeader
from distill.cache.loss_curve import LossSums
from distill.cache.origins import Origin
from distill.cache.ranks import rank_table
from distill.cache.seal import digest
from distill.cache.shard import Array, Columns, index_of
from distill.cache.shard_header import Replaced, ShardHeader, front
from distill.cache.store import Store
from distill.cache.tail import writers_of
from distill.config.errors import CacheError


def create(store: Store, header: CacheHeader, counts_V: Array | None) -> CacheHeader:
    """Makes the cache, or checks that the one there is the same; returns its header.

    Raises:
        CacheError: another cache is there (lists every difference), or it cannot be written.
    """
    store.make_folders(SHARDS, CATALOG, LOCKS)
    table = None if counts_V is None else rank_table(counts_V, header.vocab_size)
    if not store.exists(HEADER):
        if writers_of(store):
            raise CacheError(
                f"{store.root}: {HEADER} is missing and there are shards; get it back before anything is written"
            )
        header = dataclasses.replace(header, ranks="" if table is None else digest(table), folder=store.root)
        # Never put over a file that is there: another process may create the same cache at the same time.
        if table is not None:
            store.create(ranks_name(header.ranks), table)
        if store.create(HEADER, header.dump()):
            return header
    there = CacheHeader.load(store)
    expected = header.json()
    if table is None:
        del expected["ranks"]
    else:
        expected["ranks"] = digest(table)
    there.check(**expected | {"codec": header.codec})
    return there


def publish_shard(
    store: Store, cache: str, writer: str, seq: int, source: str, columns: Columns, records: Array, ends: Array,
    origins: Sequence[Origin], losses: LossSums, replaces: Sequence[Replaced] = (),
) -> ShardHeader:  # fmt: skip
    """Puts the file of n samples in place at one stroke, after which they are part of the cache.

    cache: digest of the cache's header. source: what writes the shard, as `ShardHeader.source`. records, ends: as
    `record.Encoded`. losses: of the shard's tokens, and of those that it replaces.

    Raises:
        CacheError: it cannot be written, or another process writes under this writer's name.
    """
    index = index_of(columns, records, ends)
    header = targets_header(cache, writer, seq, source, columns, index, len(records), origins, losses, replaces)
    _put(store, header, index, records.data)
    return header


def targets_header(
    cache: str, writer: str, seq: int, source: str, columns: Columns, index: bytes, records: int,
    origins: Sequence[Origin], losses: LossSums, replaces: Sequence[Replaced],
) -> ShardHeader:  # fmt: skip
    """The header of a shard; records: bytes of them all."""
    ids = columns.sample_ids
    return ShardHeader(
        cache=cache, writer=writer, seq=seq, kind="targets", source=source, step=int(columns.steps.max(initial=-1)),
        samples=len(ids), first_sample=int(ids.min()) if len(ids) else -1, last_sample=int(ids.max(initial=-1)),
        tokens=sum(origin.tokens for origin in origins), atoms=int(columns.atoms.sum()), records=records,
        index=digest(index), origins=tuple(origins), losses=losses, replaces=tuple(replaces),
    )  # fmt: skip


def publish_mark(store: Store, cache: str, writer: str, seq: int, kind: str, source: str, step: int) -> ShardHeader:
    """Puts a mark of a stream in place: begin, end or gap. CacheError as `publish_shard`."""
    header = ShardHeader(
        cache=cache, writer=writer, seq=seq, kind=kind, source=source, step=step, samples=0, first_sample=-1,
        last_sample=-1, tokens=0, atoms=0, records=0, index=digest(b""), origins=(), losses=LossSums(), replaces=(),
    )  # fmt: skip
    _put(store, header, b"", memoryview(b""))
    return header


def _put(store: Store, header: ShardHeader, index: bytes, records: memoryview) -> None:
    name = shard_name(header.writer, header.seq)
    if not store.create(name, b"".join([front(header), index, records])):
        raise CacheError(
            f"{store.path(name)}: another live process has the writer's name {header.writer!r}, or this is no shard, "
            "and codistill-cache repair moves it away"
        )


def remove_leftovers(store: Store, writer: str, seq: int) -> None:
    """Removes temporary files that a kill left where shard `seq` will be; the caller alone writes this stream."""
    group = group_name(writer, seq)
    for name in store.names(group):
        if name.endswith(TEMPORARY):
            store.remove(f"{group}/{name}")
