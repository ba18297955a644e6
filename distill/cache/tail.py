"""The tail of a cache: what its writers have published since a snapshot. No torch.

A stream goes on with the next number, so that asking for one name shows whether there is more.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from distill.cache.format import SHARDS, TOOLS, WRITER, shard_name, shard_of
from distill.cache.header import CacheHeader
from distill.cache.open_store import open_store
from distill.cache.shard import Shard, read_front
from distill.cache.shard_header import Replaced
from distill.cache.snapshot import StreamState
from distill.cache.store import Store, is_missing
from distill.config.errors import CacheError

T = TypeVar("T")

log = logging.getLogger(__name__)

_TOGETHER = 64
"""Shards whose indexes are read together."""
_NO_FILE = "not a file, so no shard, and in the way of the writer's next one; codistill-cache repair moves it away"


class Tail(NamedTuple):
    """Shards in the order of writers and numbers, and how far their streams have come with them."""

    shards: list[Shard]
    """Those that count."""
    states: dict[str, StreamState]
    replaced: list[Replaced]
    """Ranges of shards that do not count any more since these are there."""


def writers_of(store: Store) -> list[str]:
    """Names that have a stream, those of tools included."""
    return [name for name in store.names(SHARDS) if WRITER.fullmatch(name) and not store.is_alias(f"{SHARDS}/{name}")]


def is_written(folder: str | Path) -> bool:
    """Whether a writer has published anything in this folder, or URL."""
    return bool(writers_of(open_store(folder)))


def stream_seqs(store: Store, writer: str, first: int = 0) -> list[int]:
    """Numbers of the shards that are there from `first` on, ascending.

    What is no file, behind all shards, was not published by a writer: it is named in a warning and left out.
    """
    folder = f"{SHARDS}/{writer}"
    least = shard_name(writer, first).split("/")[2]
    seqs = []
    for group in store.names(folder):
        if group.isdigit() and (len(group), group) >= (len(least), least):
            places = (shard_of(f"{folder}/{group}/{name}") for name in store.names(f"{folder}/{group}"))
            seqs += [place[1] for place in places if place is not None and place[1] >= first]
    seqs.sort()
    while seqs and store.is_blocked(name := shard_name(writer, seqs[-1])):
        log.warning("%s: %s", store.path(name), _NO_FILE)
        seqs.pop()
    return seqs


class Ranges:
    """Ranges of shards, for asking whether a shard is in one of them."""

    def __init__(self, ranges: Iterable[Replaced] = ()):
        self._by_writer: dict[str, list[tuple[int, int]]] = {}
        for each in sorted(ranges, key=lambda each: (each.writer, each.first)):
            there = self._by_writer.setdefault(each.writer, [])
            # Only ranges that reach further than all before: then the last that begins at or before a shard decides.
            if not there or each.last > there[-1][1]:
                there.append((each.first, each.last))

    def __contains__(self, shard: tuple[str, int]) -> bool:
        there = self._by_writer.get(shard[0], [])
        place = bisect_right(there, (shard[1], 2**63)) - 1
        return place >= 0 and there[place][1] >= shard[1]

    def end(self, writer: str) -> int:
        """The number after the last shard of a writer's ranges; 0: there are none."""
        there = self._by_writer.get(writer)
        return there[-1][1] + 1 if there else 0

    def missing(self, writer: str, seqs: Iterable[int], count: int) -> Iterator[tuple[int, int]]:
        """Ranges, first and last, of a writer's numbers below `count` that are neither in `seqs` nor in these."""
        following = 0
        for first, last in sorted([(seq, seq) for seq in seqs] + self._by_writer.get(writer, [])):
            if min(first, count) > following:
                yield following, min(first, count) - 1
            following = max(following, last + 1)
        if following < count:
            yield following, count - 1

    def joined(self) -> list[Replaced]:
        """The same ranges, those that touch as one, by writer and number."""
        joined: list[Replaced] = []
        for writer, ranges in self._by_writer.items():
            for first, last in ranges:
                if joined and joined[-1].writer == writer and first <= joined[-1].last + 1:
                    joined[-1] = Replaced(writer, joined[-1].first, max(last, joined[-1].last))
                else:
                    joined.append(Replaced(writer, first, last))
        return joined


def replaced_by_tools(
    store: Store, header: CacheHeader, states: Mapping[str, StreamState], writers: Iterable[str] = TOOLS,
    limits: Mapping[str, int] | None = None,
) -> list[Replaced]:  # fmt: skip
    """Ranges of shards that those of tools among `writers` replace, from the count of `states` on; CacheError: damage.

    limits: as of `read_tail`.
    """
    places = [
        (name, seq)
        for name in writers
        if name in TOOLS
        for seq in stream_seqs(store, name, states.get(name, StreamState()).count)
        if limits is None or seq < limits.get(name, 0)
    ]
    fronts = store.map(lambda place: read_front(store, header, *place).header.replaces, places)
    return [each for replaces in fronts for each in replaces]


def read_tail(
    store: Store, header: CacheHeader, states: Mapping[str, StreamState], writers: Iterable[str], *,
    limits: Mapping[str, int] | None = None, most: int | None = None, is_refresh: bool = False,
    replaced: Iterable[Replaced] = (),
) -> Tail:  # fmt: skip
    """Shards of these writers' streams from the count of `states` on.

    limits: numbers at which streams end for the caller; None: they end where there are no more shards. most: stop after
    about so many samples. is_refresh: ask for the next name of each stream before anything else. replaced: ranges that
    do not count, beside those that these streams replace.

    Raises:
        CacheError: damage, or a shard that is missing and that no other replaces.
    """
    writers = sorted(writers)
    gone = Ranges([*replaced, *replaced_by_tools(store, header, states, writers, limits)])
    states, shards, samples = dict(states), list[Shard](), 0
    for writer in writers:
        state = states.get(writer, StreamState())
        first, limit = state.count, None if limits is None else limits.get(writer, 0)
        for seq, shard in _shards(store, header, writer, first, limit, gone, is_refresh, Shard):
            states[writer] = state = state.after(shard.header) if shard else state.past(seq)
            if shard is not None and (writer, seq) not in gone:
                shards.append(shard)
                samples += shard.header.samples
            if most is not None and samples >= most:
                return Tail(shards, states, gone.joined())
    return Tail(shards, states, gone.joined())


def _shards(
    store: Store, header: CacheHeader, writer: str, first: int, limit: int | None, gone: Ranges, is_refresh: bool,
    load: Callable[[Store, CacheHeader, str, int], T],
) -> Iterator[tuple[int, T | None]]:  # fmt: skip
    """Shards by number, in order, as `load` gives them; None: one that is replaced and not there any more."""
    if limit is None:
        if is_refresh and not store.exists(shard_name(writer, first)):
            return
        limit = max([first, gone.end(writer), *(seq + 1 for seq in stream_seqs(store, writer, first))])

    def loaded(seq: int) -> T | None:
        # A folder's names are not read at one moment, so that a new shard may be seen before the one in front of it.
        for _ in range(2):
            try:
                return load(store, header, writer, seq)
            except CacheError as error:
                if not is_missing(error):
                    raise
            if (writer, seq) in gone:
                return None
        raise CacheError(
            f"{store.path(shard_name(writer, seq))}: the shard is missing; if `compact --purge` has removed it, "
            "refresh the reader: a view from before the compaction cannot be read any more; else codistill-cache "
            "repair helps"
        )

    for start in range(first, limit, _TOGETHER):
        part = range(start, min(start + _TOGETHER, limit))
        yield from zip(part, store.map(loaded, part), strict=True)


def next_seq(store: Store, header: CacheHeader, writer: str, states: Mapping[str, StreamState]) -> StreamState:
    """The state of a writer's stream with all that is published after `states`, of a snapshot; CacheError as
    `read_tail`. Reads headers alone.
    """
    state, gone = states.get(writer, StreamState()), Ranges(replaced_by_tools(store, header, states))
    for seq, front in _shards(store, header, writer, state.count, None, gone, False, read_front):
        state = state.after(front.header) if front else state.past(seq)
    if store.is_blocked(name := shard_name(writer, state.count)):
        raise CacheError(f"{store.path(name)}: {_NO_FILE}")
    return state
