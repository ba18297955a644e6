"""A shard read without trust, record by record. No torch, unless records are decoded."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import xxhash

from distill.cache.format import SHARDS
from distill.cache.header import CacheHeader
from distill.cache.ledger import ShardRow
from distill.cache.shard import Array, Shard, row_of_file
from distill.cache.store import Store
from distill.config.errors import CacheError
from distill.tools.token_counter import TokenCounter

_BLOCK = 8 << 20
"""Bytes of one read."""


class ShardScan(NamedTuple):
    """One shard, whatever its state."""

    shard: Shard | None
    """None: nothing of it can be read."""
    records: list[bytes | None]
    """If they were asked for: None where one is damaged."""
    problems: list[str]


def examine(
    store: Store,
    header: CacheHeader,
    row: ShardRow,
    *,
    keep: bool = False,
    counter: TokenCounter | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> ShardScan:
    """Verifies every byte of a shard.

    counter: decodes the records, too. keep: return the records; with `counter`, even those of a shard whose index is
    damaged, where that can be. advance: is given the bytes that have been read.
    """
    problems: list[str] = []
    shard = _open(store, header, row, problems)
    if shard is None and keep and counter is not None:
        shard = _without_index(store, row)
    if shard is None:
        advance(row.bytes)
        return ShardScan(None, [], problems)
    problems += _disagreements(shard)
    whole = xxhash.xxh3_64(store.read_at(f"{SHARDS}/{row.shard}", 0, row.index_bytes))
    advance(row.index_bytes)
    records: list[bytes | None] = []
    for first, end in blocks(shard.bounds):
        data = shard.read(first, end)
        whole.update(data)
        block = _verified(shard, header, data, first, end, counter, problems)
        if keep:
            records += block
        advance(len(data))
    if whole.hexdigest() != row.file_digest and not problems:
        problems.append(f"{shard.path} is damaged: its digest is {whole.hexdigest()}, {row.file_digest} in the ledger")
    return ShardScan(shard, records, problems)


def _open(store: Store, header: CacheHeader, row: ShardRow, problems: list[str]) -> Shard | None:
    """The shard, if its index verifies and fits the corpus."""
    name = f"{SHARDS}/{row.shard}"
    try:
        if (size := store.size(name)) != row.bytes:
            problems.append(f"{store.path(name)} is damaged: {size} bytes, {row.bytes} in the ledger")
        shard = Shard(store, row, whole=False)
    except CacheError as error:
        problems.append(str(error))
        return None
    if int(shard.columns.sample_ids.max(initial=-1)) >= header.samples:
        problems.append(f"{shard.name}: does not fit a corpus of {header.samples} samples")
        return None
    return shard


def _without_index(store: Store, row: ShardRow) -> Shard | None:
    """A shard whose index does not verify, if its records are known by their own checks.

    These bind id and token digest. A single origin is that of every record, whatever the column holds; no step is below
    the origin's first; and the number of atoms shows when a record is decoded.
    """
    if len(row.origins) != 1:
        return None
    try:
        shard = Shard(store, row, whole=False, sound=False)
    except CacheError:
        return None
    zeros = np.zeros(row.samples, np.int64)
    shard.columns = shard.columns._replace(steps=zeros + row.origins[0].first_step, origins=zeros)
    return shard


def _disagreements(shard: Shard) -> list[str]:
    """Where the ledger's row and the verified index differ."""
    row, columns = shard.row, shard.columns
    in_row = (row.first_sample, row.last_sample, row.atoms, row.tokens)
    ids = columns.sample_ids
    in_index = (
        int(ids.min(initial=2**62)),
        int(ids.max(initial=-1)),
        int(columns.atoms.sum()),
        sum(o.tokens for o in row.origins),
    )
    counts = np.bincount(columns.origins, minlength=len(row.origins)).tolist()
    problems = []
    if in_row != in_index:
        problems.append(f"{shard.path}: first and last sample, atoms and tokens are {in_index}, {in_row} in the ledger")
    if counts != [origin.samples for origin in row.origins]:
        problems.append(f"{shard.path}: its origins do not have the samples that the ledger has")
    return problems


def _verified(
    shard: Shard,
    header: CacheHeader,
    data: bytes,
    first: int,
    end: int,
    counter: TokenCounter | None,
    problems: list[str],
) -> list[bytes | None]:
    """The records number `first` to `end` - 1, whose bytes `data` are.

    None: one that does not verify or, where there is a counter, cannot be decoded.
    """
    bounds = (shard.bounds[first : end + 1] - shard.bounds[first]).tolist()
    block: list[bytes | None] = []
    for i in range(first, end):
        sample = int(shard.columns.sample_ids[i])
        try:
            if not 0 <= sample < header.samples:
                raise CacheError(f"{shard.path} is damaged: sample {sample} does not verify")
            block.append(shard.verified(i, data[bounds[i - first] : bounds[i - first + 1]]))
        except CacheError as error:
            problems.append(str(error))
            block.append(None)
    if counter is None:
        return block
    sound = [i for i, record in enumerate(block) if record is not None]
    atoms = shard.columns.atoms[[first + i for i in sound]].tolist()
    for i, count in zip(sound, counter([record for record in block if record is not None], atoms), strict=True):
        if count is None:
            sample = int(shard.columns.sample_ids[first + i])
            problems.append(f"{shard.path} is damaged: sample {sample} verifies and is not a record")
            block[i] = None
    return block


def blocks(bounds: Array) -> list[tuple[int, int]]:
    """Runs of records of about 8 MB, which lie between `bounds`: first and end of each."""
    runs, first, count = [], 0, len(bounds) - 1
    while first < count:
        end = int(np.searchsorted(bounds, bounds[first] + _BLOCK, side="right")) - 1
        end = min(max(end, first + 1), count)
        runs.append((first, end))
        first = end
    return runs


def row_from_file(store: Store, name: str, identity: str, source: str | None) -> ShardRow:
    """The ledger row of a shard, made again from the file alone.

    source: what wrote it; None: as its records' origin has it. Raises CacheError: what is wrong with the file.
    """
    row = row_of_file(store.read(f"{SHARDS}/{name}"), name, source)
    if row.cache != identity:
        raise CacheError("it belongs to another cache")
    return row
