"""The shards of a local cache, as their own headers have them."""

from __future__ import annotations

from pathlib import Path

from distill.cache import CacheHeader
from distill.cache.open_store import open_store
from distill.cache.shard import read_front
from distill.cache.shard_header import ShardHeader
from distill.cache.tail import stream_seqs, writers_of


def headers(cache: Path, source: str | None = None) -> list[ShardHeader]:
    """Headers of the shards with targets, by writer and number; source: of those that it wrote."""
    store, header = open_store(cache), CacheHeader.load(cache)
    found = [
        read_front(store, header, writer, seq).header
        for writer in writers_of(store)
        for seq in stream_seqs(store, writer)
    ]
    return [each for each in found if not each.is_mark and source in (None, each.source)]
