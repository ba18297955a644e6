"""What can be proven of a damaged shard's records, and a shard of what is good. No torch, until records are decoded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distill.cache.entries import ENTRY, Array
from distill.cache.header import CacheHeader
from distill.cache.loss_curve import LossSums
from distill.cache.publish import targets_header
from distill.cache.seal import digest
from distill.cache.shard import Columns, Front, columns_of, front_of, index_bytes
from distill.cache.shard_header import WIDTH, Replaced, ShardHeader, front
from distill.cache.store import Store
from distill.config.errors import CacheError
from distill.tools.repack import part_of
from distill.tools.shard_scan import Place, Rows, read_part, runs, sound
from distill.tools.token_counter import TokenCounter


@dataclass
class Salvage:
    """The good records of a damaged file, which become a shard of the same writer and number."""

    place: Place
    file: str
    """Where they are read from."""
    header: ShardHeader | None
    """Of that file, if it verifies."""
    rows: Rows
    good: NDArray[np.bool_]
    """Which of the rows verify."""
    unnamed: int | None
    """Records that are lost beside those of `rows`, of samples that are not known; None: nor is their number."""
    replaces: tuple[Replaced, ...] = ()
    losses: LossSums | None = None
    """Of the header, if that verifies."""

    @property
    def kept(self) -> Array:
        return self.rows.entries[self.good]

    @property
    def lost(self) -> Array:
        """Entries whose records are lost, if it is sure that they had been there."""
        return self.rows.entries[~self.good]


NOTHING = Rows(np.empty(0, ENTRY), 0, ())


def salvage(
    store: Store, cache: CacheHeader, place: Place, file: str, listed: Rows | None, counter: TokenCounter
) -> Salvage:
    """Looks for what is good in a file that lies, or lay, in a shard's place; "": there is none.

    listed: what listings have of its records, which serves where its header or index does not verify.
    """
    here = None
    with contextlib.suppress(CacheError):  # the listings are left
        here = front_of(store, cache, file) if file else None
    if here is None or (here.header.writer, here.header.seq) != place:
        rows = listed or NOTHING
        good = sound(store, file, rows, counter=counter)
        return Salvage(place, file, None, rows, good, None if listed is None else 0)
    header, size = here.header, WIDTH * here.header.samples
    index = read_part(store, file, here.size, size)
    is_proven = digest(index) == header.index
    rows = _indexed(index.ljust(size, b"\0"), here, cache.samples, is_proven=is_proven)
    if not is_proven and listed is not None:
        rows = listed._replace(origins=header.origins)
    good, unnamed = sound(store, file, rows, counter=counter), 0
    if not is_proven and listed is None:  # nothing says that the others had ever been there
        rows, good = rows._replace(entries=rows.entries[good]), good[good]
        unnamed = header.samples - len(good)
    return Salvage(place, file, header, rows, good, unnamed, header.replaces, header.losses)


def _indexed(index: bytes, here: Front, samples: int, *, is_proven: bool) -> Rows:
    """What an index says. If it does not verify, records are still known by their checks, which bind id and tokens.

    Then a single origin is that of every record, no step is below the origin's first, and the number of atoms shows
    when a record is decoded.
    """
    header = here.header
    columns = columns_of(index, header.samples)
    ends = columns["ends"].astype(np.int64)
    starts = np.concatenate([[0], ends])[:-1]
    can_be = (ends >= starts) & (ends <= header.records) & (columns["sample_ids"] >= 0)
    can_be &= (columns["sample_ids"] < samples) & (is_proven or len(header.origins) == 1)
    can_be &= (columns["origins"] < len(header.origins)) | (not is_proven)
    entries = np.empty(header.samples, ENTRY)
    for name, column in (("sample", "sample_ids"), ("digest", "digests"), ("check", "checks"), ("atoms", "atoms")):
        entries[name] = columns[column]
    entries["start"], entries["size"] = starts, np.where(can_be, ends - starts, 0)
    entries["step"], entries["origin"] = columns["steps"], columns["origins"]
    if not is_proven and header.origins:
        entries["step"], entries["origin"] = header.origins[0].first_step, 0
    return Rows(entries[can_be], here.size + WIDTH * header.samples, header.origins)


def write(store: Store, cache: CacheHeader, made: Salvage, name: str, source: str, counter: TokenCounter) -> None:
    """Writes the shard of what is good; source: what wrote the damaged one, where its header does not verify."""
    entries, origins = made.kept, made.rows.origins
    steps, atoms = entries["step"].astype(np.int64), entries["atoms"].astype(np.int64)
    columns = Columns(entries["sample"], entries["digest"], steps, atoms, entries["origin"].astype(np.int64))
    tokens, losses = np.zeros(len(origins), np.int64), LossSums()
    for first, end, parts in _records(store, made):
        run = columns.take(np.arange(first, end))
        sums = counter.sums(run, parts, origins)
        np.add.at(tokens, run.origins, sums.tokens)
        losses.update(sums.losses)
    part, ends = part_of(columns, [], origins, tokens.tolist()), np.cumsum(entries["size"].astype(np.int64))
    index = index_bytes(part.columns, entries["check"], ends)
    header = targets_header(
        cache.identity, *made.place, made.header.source if made.header else source, part.columns, index,
        int(entries["size"].sum(dtype=np.int64)), part.origins, made.losses or losses, made.replaces,
    )  # fmt: skip
    if made.header is not None and made.header.is_mark:
        header = made.header

    def data() -> Iterator[bytes]:
        yield front(header) + index
        for _, _, parts in _records(store, made):
            yield b"".join(parts)

    store.publish_parts(name, data())


def _records(store: Store, made: Salvage) -> Iterator[tuple[int, int, list[bytes]]]:
    """Runs of good records: number of the first, end, and their bytes."""
    entries = made.kept
    for first, end in runs(entries):
        start = int(entries["start"][first])
        size = int(entries["start"][end - 1]) + int(entries["size"][end - 1]) - start
        data = store.read_at(made.file, made.rows.records_at + start, size)
        starts = entries["start"][first:end].astype(np.int64) - start
        sizes = entries["size"][first:end].tolist()
        yield first, end, [data[at : at + size] for at, size in zip(starts.tolist(), sizes, strict=True)]
