"""The two moments at which something becomes part of a cache: its creation, and the ledger row of a shard. No torch."""

from __future__ import annotations

import dataclasses
import json

from distill.cache.format import HEADER, LEDGER, SHARDS, ranks_name, shard_name
from distill.cache.header import CacheHeader
from distill.cache.ledger import LedgerWriter, Origin, ShardRow
from distill.cache.ranks import rank_table
from distill.cache.seal import digest
from distill.cache.shard import Array, Columns, build
from distill.cache.store import Store


def create(store: Store, header: CacheHeader, counts_V: Array | None) -> CacheHeader:
    """Makes the cache, or checks that the one there is this one; returns its header.

    Raises:
        CacheError: another cache is there (lists every difference), or it cannot be written.
    """
    store.make_folders(SHARDS, LEDGER)
    if not store.exists(HEADER):
        table = rank_table(counts_V, header.vocab_size)
        header = dataclasses.replace(header, ranks=digest(table), folder=store.root)
        data = header.dump()
        # Not published over one that is there: another process may be at the same place, and read or write it.
        store.create(ranks_name(header.ranks), table)
        if store.create(HEADER, data):
            return header
    there = CacheHeader.read(store)
    expected = header.json()
    if counts_V is None:
        del expected["ranks"]
    else:
        expected["ranks"] = digest(rank_table(counts_V, header.vocab_size))
    there.check(**expected | {"codec": header.codec})
    return there


def publish_shard(
    store: Store, ledger: LedgerWriter, source: str, columns: Columns, records: Array, ends: Array,
    origins: tuple[Origin, ...],
) -> ShardRow:  # fmt: skip
    """File first, then the row: whatever is interrupted is not there.

    Raises:
        CacheError: it cannot be written, or another process writes under this ledger's name.
    """
    facts = json.dumps([dataclasses.asdict(origin) for origin in origins], allow_nan=False)
    data, index_bytes = build(columns, records, ends, {"cache": ledger.cache, "origins": facts})
    file_digest = digest(data)
    name = shard_name(ledger.writer, ledger.seq, file_digest)
    store.publish(f"{SHARDS}/{name}", data)
    row = ShardRow(
        writer=ledger.writer,
        seq=ledger.seq,
        cache=ledger.cache,
        shard=name,
        source=source,
        samples=len(columns.sample_ids),
        first_sample=int(columns.sample_ids.min()),
        last_sample=int(columns.sample_ids.max()),
        tokens=sum(origin.tokens for origin in origins),
        atoms=int(columns.atoms.sum()),
        bytes=len(data),
        file_digest=file_digest,
        index_bytes=index_bytes,
        index_digest=digest(memoryview(data)[:index_bytes]),
        origins=origins,
    )
    ledger.append(row)
    return row
