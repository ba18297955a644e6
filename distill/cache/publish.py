"""Creation of a cache, and publication of a shard in it. No torch."""

import dataclasses
import json

from distill.cache.format import HEADER, LEDGER, SHARDS, ranks_name, shard_name
from distill.cache.header import CacheHeader
from distill.cache.ledger import LedgerWriter, Origin, ShardRow
from distill.cache.ranks import rank_table
from distill.cache.seal import digest
from distill.cache.shard import Array, Columns, build, row_of_file
from distill.cache.store import Store


def create(store: Store, header: CacheHeader, counts_V: Array | None) -> CacheHeader:
    """Makes the cache, or checks that the one there is the same; returns its header.

    Raises:
        CacheError: another cache is there (lists every difference), or it cannot be written.
    """
    store.make_folders(SHARDS, LEDGER)
    if not store.exists(HEADER):
        table = rank_table(counts_V, header.vocab_size)
        header = dataclasses.replace(header, ranks=digest(table), folder=store.root)
        data = header.dump()
        # Never put over a file that is there: another process may create the same cache at the same time.
        store.create(ranks_name(header.ranks), table)
        if store.create(HEADER, data):
            return header
    there = CacheHeader.load(store)
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
    """Puts the file of n samples in place, then appends its row: whatever is interrupted is not part of the cache.

    source: what writes the shard, as `ShardRow.source`. records, ends: as `record.Encoded`.

    Raises:
        CacheError: it cannot be written, or another process writes under this ledger's name.
    """
    metadata = {"cache": ledger.cache, "origins": json.dumps(list(map(dataclasses.asdict, origins)), allow_nan=False)}
    data = build(columns, records, ends, metadata)
    name = shard_name(ledger.writer, ledger.seq, digest(data))
    store.publish(f"{SHARDS}/{name}", data)
    row = row_of_file(data, name, source)
    ledger.append(row)
    return row
