"""What a repair will do, and what will be lost, from a look at everything. Nothing is written here."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from distill.cache.entries import Array
from distill.cache.format import QUARANTINE, SHARDS, TOOLS, shard_name, shard_of, writer_lock
from distill.cache.header import CacheHeader
from distill.cache.loss_curve import LossSums
from distill.cache.shard import Shard, front_of, read_front
from distill.cache.shard_header import Replaced
from distill.cache.snapshot import StreamState
from distill.cache.store import Store
from distill.cache.tail import Ranges, writers_of
from distill.config.terminal import advancing
from distill.tools.catalog_scan import listed_rows, scan_catalog
from distill.tools.common import blocked_locks, is_live
from distill.tools.salvage import Salvage, salvage
from distill.tools.shard_scan import Place, Rows, ShardScan, examine, read_part, shard_files
from distill.tools.token_counter import TokenCounter
from distill.tools.verify import catalog_problems

_MOST_GAPS = 100_000
"""Missing shards, one after the other, whose numbers marks take; shards behind more of them are set aside."""


@dataclass
class Repair:
    """What a repair does, or would do; two are equal where that is the same."""

    lines: list[str] = field(default_factory=list)
    """Of the report, in the order of the work."""
    lost: list[int] = field(default_factory=list)
    """Samples whose newest record is lost, ascending."""
    uncovered: list[int] = field(default_factory=list)
    """Of these: no older record is left."""
    unnamed: int = 0
    """Shards of which some records are lost whose samples are not known."""
    saved: int = 0
    """Records in shards that are made of damaged ones."""
    left: int = 0
    """Problems of live writers' streams, which are left alone."""
    report: str = field(default="", compare=False)
    """Path of the report, if one was written."""

    def add(self, other: Repair) -> None:
        """What an earlier one had begun, which had seen what is left of the same damage."""
        self.lines = [*other.lines, *(line for line in self.lines if line not in other.lines)]
        for name in ("lost", "uncovered"):
            setattr(self, name, sorted({*getattr(self, name), *getattr(other, name)}))
        self.unnamed, self.saved = max(self.unnamed, other.unnamed), max(self.saved, other.saved)


class Move(NamedTuple):
    """A file that goes out of its place."""

    name: str
    aside: str
    """Its name in quarantine; "": it is there."""
    to: Place | None = None
    """The place that it takes from there."""


@dataclass
class RepairPlan:
    """What is to be done, in the order of the work."""

    salvages: list[tuple[Salvage, str]] = field(default_factory=list)
    """Shards that are written anew from what is good, and what wrote them first."""
    moves: list[Move] = field(default_factory=list)
    marks: list[tuple[Place, StreamState]] = field(default_factory=list)
    """Places where a mark goes: the end of a stream that had come so far, or a gap."""
    removed: list[str] = field(default_factory=list)
    """Copies of whole shards, and temporary files."""


class Look:
    """A look at everything, from which a plan is made."""

    def __init__(self, store: Store, header: CacheHeader, locks: contextlib.ExitStack | None):
        """locks: holds those of writers that no live process has; None: nothing is held."""
        self._store, self.header, self._locks = store, header, locks
        self.live: set[str] = set()
        self._known: set[str] = set(TOOLS)
        self.done, self.plan = Repair(), RepairPlan()
        self.counter = TokenCounter(store, header)
        self.found = scan_catalog(store, header)
        self._lock({*writers_of(store), *(name for each in self.found.snapshots for name in each.streams)})
        self.files = shard_files(store)
        self.good: dict[Place, ShardScan] = {}
        self.damaged: dict[Place, ShardScan] = {}
        self.strangers: list[ShardScan] = []
        """Files that are not what their names say."""
        self.made: list[Salvage] = []
        self.problems: dict[str, str] = {}
        """Of the catalog, by file."""
        with advancing("repair", store.bytes_in(SHARDS)) as advance:
            scans = [examine(store, header, name, advance=advance) for name in self.files.files]
        self._lock({each.own[0] for each in scans if each.own})
        for scan in scans:
            self._sort(scan)
        self.gone = Ranges()

    def _lock(self, writers: Iterable[str]) -> None:
        """Holds the names of writers that are not alive."""
        for name in sorted(set(writers) - self._known):
            self._known.add(name)
            if is_live(self._store, name):
                self.live.add(name)
            elif self._locks is not None and not self._store.is_blocked(lock := writer_lock(name)):
                self._locks.enter_context(self._store.lock(lock, f"the writer's name {name!r}"))

    def _sort(self, scan: ShardScan) -> None:
        path, place = self._store.path(scan.name), scan.place
        if scan.is_whole and place is not None and scan.own == place:
            self.good[place] = scan
        elif self.live & {each[0] for each in (place, scan.own) if each is not None}:
            self.done.left += 1
            what = scan.problems[0] if scan.problems else f"{path}: it is shard {scan.own}"
            self.done.lines.append(f"{what}; left alone, since its writer is alive")
        elif scan.is_whole or place is None:
            self.strangers.append(scan)
        else:
            self.damaged[place] = scan

    # ------------------------------------------------------------ files under a wrong name

    def place_strangers(self) -> None:
        """Whole shards under a wrong name get their own, if no whole shard has it."""
        for scan in self.strangers:
            path, own = self._store.path(scan.name), scan.own
            if own is None or not scan.is_whole:
                self._set_aside(scan.name, f"{scan.problems[0]}; not part of the cache, moved to quarantine")
                continue
            what, home = f"{path}: {scan.belongs}", self.good.get(own)
            if home is None:
                self.done.lines.append(f"{what}; moved to {shard_name(*own)}")
                if own in self.damaged:
                    there = self.damaged.pop(own)
                    self._set_aside(there.name, f"{there.problems[0]}; moved to quarantine, since that one is whole")
                self.plan.moves.append(Move(scan.name, shard_name(*own), own))
                self.good[own] = dataclasses.replace(scan, name=shard_name(*own))
            elif home.key == scan.key:
                self.done.lines.append(f"{what}, and whole there; removed")
                self.plan.removed.append(scan.name)
            else:
                self._set_aside(scan.name, f"{what}, and another one is there; moved to quarantine")

    def _set_aside(self, name: str, line: str, aside: str = "") -> None:
        self.done.lines.append(line)
        self.plan.moves.append(Move(name, aside or name))

    # ------------------------------------------------------------ damaged and missing shards

    def fill_places(self) -> None:
        """Each number of a stream has a shard again, or a mark."""
        listed = listed_rows(self.found, set(self.damaged))
        made = {place: self._salvage(place, scan.name, listed) for place, scan in self.damaged.items()}
        self.gone = self._replaced(made.values())
        kept = self._quarantined()
        empty, is_cut = set(kept), set(self.live)
        for writer, first, last in list(self.found.holes([*self.good, *self.damaged], self.gone)):
            if writer not in is_cut and last - first >= _MOST_GAPS:
                self._cut(writer, first, last)
                is_cut.add(writer)
            elif writer not in is_cut:
                empty |= {(writer, seq) for seq in range(first, last + 1)}
        empty -= {place for place in empty if self._taken_up(place, kept.get(place, []))}
        listed = listed_rows(self.found, empty)
        made |= {place: self._salvage(place, (kept.get(place) or [""])[0], listed) for place in empty}
        for place, salvaged in sorted(made.items(), key=lambda item: item[0]):
            if place in self.damaged or place in empty:
                self._settle(place, salvaged, self.damaged.get(place))

    def _replaced(self, made: Iterable[Salvage]) -> Ranges:
        """Shards that whole ones, and some that are made, replace."""
        parts = [scan.header.replaces for scan in self.good.values() if scan.header is not None]
        return Ranges(replaced for part in [*parts, *(each.replaces for each in made)] for replaced in part)

    def _salvage(self, place: Place, file: str, listed: dict[Place, Rows]) -> Salvage:
        return salvage(self._store, self.header, place, file, listed.get(place), self.counter)

    def _cut(self, writer: str, first: int, last: int) -> None:
        for place in [each for each in [*self.good, *self.damaged] if each[0] == writer and each[1] > last]:
            scan = self.good.pop(place, None) or self.damaged.pop(place)
            what = f"shards {first} to {last} in front of it are missing; moved to quarantine"
            self._set_aside(scan.name, f"{self._store.path(scan.name)}: {what}", f"beyond/{scan.name}")

    def _quarantined(self) -> dict[Place, list[str]]:
        """Files in quarantine whose place is empty, as a stopped repair leaves them."""
        found: dict[Place, list[str]] = {}
        for name in shard_files(self._store, f"{QUARANTINE}/{SHARDS}").files:
            place = shard_of(re.sub(r"\.\d+$", "", name.removeprefix(f"{QUARANTINE}/")))
            if place and not (
                place in self.good or place in self.damaged or place in self.gone or place[0] in self.live
            ):
                found.setdefault(place, []).append(name)
        return found

    def _taken_up(self, place: Place, names: list[str]) -> bool:
        """Whether one of these files in quarantine is whole and takes its place."""
        for name in names:
            scan = examine(self._store, self.header, name)
            if scan.is_whole and scan.own == place:
                self.done.lines.append(f"{self._store.path(name)}: moved to its place, {shard_name(*place)}")
                self.plan.moves.append(Move(name, "", place))
                self.good[place] = dataclasses.replace(scan, name=shard_name(*place))
                return True
        return False

    def _settle(self, place: Place, made: Salvage, scan: ShardScan | None) -> None:
        """Decides what takes a place. scan: of the damaged file that is there."""
        state, kept, bad = self._state(place), len(made.kept), ranges(sorted(set(made.lost["sample"].tolist())))
        if made.header is None and not kept and (state.finished or self._was_mark(made, place)):
            made.unnamed, bad = 0, ""
        if made.unnamed is None:
            lost = "nothing can be read of it" if made.file else "the shard is missing, and what it held is not known"
        elif made.unnamed and made.header is not None:
            among = f"samples {made.header.first_sample} to {made.header.last_sample}"
            lost = f"{made.unnamed} records among {among} are damaged"
        elif bad:
            lost = f"the records of samples {bad} are {'damaged' if made.file else 'missing with it'}"
        else:
            lost = "damaged, but no record of it" if made.file else "the shard is missing"
        where = "; the damaged file is moved to quarantine" if scan else ""
        if made.header is not None or kept:
            self.plan.salvages.append((made, state.source))
            self.done.saved += kept
            outcome = f"{kept} records are kept"
        else:
            self.plan.marks.append((place, state))
            outcome = f"a mark ({'end' if state.finished else 'gap'}) takes its number"
        self.done.lines.append(f"{self._store.path(shard_name(*place))}: {lost}; {outcome}{where}")
        self.done.unnamed += made.unnamed != 0 and place not in self.gone
        if scan is not None:
            self.plan.moves.append(Move(scan.name, scan.name))
        self.made.append(made)

    def _was_mark(self, made: Salvage, place: Place) -> bool:
        """Whether a place held no records: its file says so, or the snapshot counts it and lists nothing of it."""
        newest, (writer, seq) = self.found.newest, place
        if newest is not None and made.unnamed is None and place not in self.gone:
            return seq < newest.streams.get(writer, StreamState()).count
        return bool(self._mark(place, made.file))

    def _mark(self, place: Place, file: str) -> str:
        """Of which kind a damaged file seems to be a mark for a place; "": it is none."""
        writer, seq = place
        what = rf'\\"writer\\": \\"{writer}\\", \\"seq\\": {seq}, \\"kind\\": \\"(begin|end|gap)\\"'
        start = read_part(self._store, file, 0, 4096) if file else b""
        match = re.search(what.encode(), start)
        return match[1].decode() if match else ""

    def _state(self, place: Place) -> StreamState:
        """Of the stream in front of a place; finished, where there was an end mark at the place."""
        writer, seq = place
        states = [each.streams[writer] for each in self.found.snapshots if writer in each.streams]
        scan = self.damaged.get(place)
        is_end = any(each.finished and each.count == seq + 1 for each in states)
        is_end |= scan is not None and self._mark(place, scan.name) == "end"
        state = StreamState(source=writer if writer in TOOLS else "")
        if is_end or scan is not None:
            for number in sorted(number for name, number in self.good if name == writer and number < seq):
                header = self.good[writer, number].header
                assert header is not None
                state = state.after(header)
        return dataclasses.replace(state, finished=is_end)

    # ------------------------------------------------------------ what is lost

    def count_losses(self) -> None:
        """Which samples have lost their newest record, and of which an older one is left.

        Of a shard that loses records, those that it has replaced and that are still there count again.
        """
        losing = [each for each in self.made if len(each.lost) or each.unnamed]
        others = self._replaced(each for each in self.made if each not in losing)
        for each in losing:
            mine = Ranges(each.replaces)
            back = {place for place in self.good if place in mine and place not in others}
            kept = (
                Replaced(one.writer, seq, seq)
                for one in each.replaces
                for seq in range(one.first, one.last + 1)
                if (one.writer, seq) not in back
            )
            each.replaces = tuple(Ranges(kept).joined())
            for place in back if each.losses is not None else ():
                header = read_front(self._store, self.header, *place).header
                each.losses = LossSums.total([each.losses or LossSums()], [header.losses])
        wanted: dict[int, int] = {}
        for each in self.made:
            lost = each.lost if each.place not in self.gone else each.lost[:0]
            for sample, step in zip(lost["sample"].tolist(), lost["step"].tolist(), strict=True):
                wanted[sample] = max(wanted.get(sample, -1), step)
        samples = np.array(sorted(wanted), np.int64)
        left = np.full(len(samples), -1, np.int64)
        for ids, steps in self._remaining() if wanted else ():
            here = np.isin(ids, samples)
            np.maximum.at(left, np.searchsorted(samples, ids[here]), steps[here])
        self.done.lost = samples[left < np.array([wanted[each] for each in samples.tolist()], np.int64)].tolist()
        self.done.uncovered = samples[left < 0].tolist()

    def _remaining(self) -> Iterator[tuple[Array, Array]]:
        """Ids and steps of all records that are there afterwards and count."""
        gone = self._replaced(self.made)
        moved = {move.to: move.name for move in self.plan.moves if move.to is not None}
        for place, scan in self.good.items():
            if place not in gone and scan.header is not None and scan.header.samples:
                name = moved.get(place, scan.name)
                columns = Shard(
                    self._store, self.header, *place, front_of(self._store, self.header, name), name
                ).columns
                yield columns.sample_ids, columns.steps
        for made in self.made:
            yield made.kept["sample"], made.kept["step"].astype(np.int64)

    # ------------------------------------------------------------ the rest

    def tidy(self) -> None:
        """Leftovers of writers and tools that are not alive; damaged files of the catalog."""
        for name in [*self.files.temporary, *([] if self.live else self.found.temporary)]:
            if name.split("/")[1] not in self.live:
                self.done.lines.append(f"{self._store.path(name)}: a file that was being written; removed")
                self.plan.removed.append(name)
        for name in blocked_locks(self._store):
            self._set_aside(name, f"{self._store.path(name)}: expected a lock file; moved to quarantine")
        for name in self.found.unnamed if not self.live else ():
            self.done.lines.append(f"{self._store.path(name)}: no snapshot names it; removed")
            self.plan.removed.append(name)
        is_sound = not (self.made or self.plan.moves or self.done.left)
        places = [place for place in map(shard_of, self.files.files) if place is not None]
        self.problems = catalog_problems(self._store, self.header, self.found, places, self.good, is_sound=is_sound)
        for name, problem in self.problems.items():
            how = "moved to quarantine, and the catalog made anew" if name in self.found.damaged else "made anew"
            self.done.lines.append(f"{problem}; {how}")


def ranges(numbers: list[int]) -> str:
    """`0 to 4, 7, 9 to 12` of ascending numbers."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{a} to {b}" if b > a else str(a) for a, b in spans)
