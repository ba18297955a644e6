"""Turns a cache of format 2, in which ledgers list the shards, into one of the present format: the same records, and
loss sums by the teacher's step from the stored log-probabilities of labels. Everything is verified.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from distill.cache import cataloging
from distill.cache.entries import ENTRY, newest
from distill.cache.fields import checked
from distill.cache.format import HEADER, RECORDS, SHARDS
from distill.cache.header import CacheHeader
from distill.cache.loss_curve import LossSums
from distill.cache.origins import Origin
from distill.cache.publish import publish_mark
from distill.cache.seal import digest, unseal
from distill.cache.shard import Array, Columns, check
from distill.cache.shard_header import COLUMNS, Replaced
from distill.cache.store import Store
from distill.cache.tail import Ranges, writers_of
from distill.cache.view import View, open_view
from distill.config.errors import CacheError
from distill.config.schema import CodecConfig
from distill.config.terminal import advancing
from distill.tools import common
from distill.tools.merge import losses_of, open_target
from distill.tools.repack import NOTHING, Packer, part_of
from distill.tools.token_counter import TokenCounter

LEDGER = "ledger"


class Ledger(NamedTuple):
    """One writer's shards, in rows of JSON."""

    writer: str
    shards: list[dict[str, Any]]
    retired: list[Replaced]
    is_finished: bool


def is_here(store: Store) -> bool:
    """Whether a cache is of format 2."""
    return bool(store.names(LEDGER)) or (store.exists(HEADER) and b'"format": 2,' in store.read(HEADER)[:64])


def convert(store: Store, target: Store, shard_bytes: int) -> tuple[int, int, int]:
    """Copies what counts into `target`, which is made if need be, or goes on; returns records, shards, bytes written.

    Raises:
        CacheError: damage, another cache in the target's place, or too little room on its disk.
    """
    with _refused(store):
        record = unseal(data := store.read(HEADER))
        del record["format"]
        header = checked(CacheHeader, record | {"codec": checked(CodecConfig, record["codec"])})
        names = {name.removesuffix(".jsonl") for name in store.names(LEDGER)}
        if lost := {name.rsplit("-", 2)[0] for name in store.names(SHARDS)} - names:
            raise ValueError(f"no ledger lists the shards of {', '.join(sorted(lost))}")
        ledgers = [_ledger(store, name, digest(data)) for name in sorted(names) if "." not in name]
        gone = Ranges(each for ledger in ledgers for each in ledger.retired)
        rows = [row for each in ledgers for row in each.shards if (each.writer, row["seq"]) not in gone]
        places = _newest(store, header, rows)
    with common.alone(target):
        made = open_target(target, store, header)
        cataloging.update(target, made)
        there = open_view(target, made)
        common.check_room(target, 0 if there.parts else sum(row["bytes"] for row in rows), "the conversion")
        packer = Packer(target, made, "merge", shard_bytes)
        copied = _copy(store, header, rows, places, there, packer)
        for each in ledgers:  # teachers' streams end, or go on, where they did
            if {row["source"] for row in each.shards} == {"capture"} and each.writer not in writers_of(target):
                last = max(origin.last_step for row in each.shards for origin in row["origins"])
                kind = "end" if each.is_finished else "begin"
                publish_mark(target, made.identity, each.writer, 0, kind, "capture", last)
        cataloging.update(target, made, is_merging=True)
    return copied, len(packer.shards), sum(shard.bytes for shard in packer.shards)


@contextlib.contextmanager
def _refused(store: Store) -> Iterator[None]:
    """Names, in errors about damage, what can repair it."""
    try:
        yield
    except (CacheError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CacheError(
            f"{store.root}: a cache of format 2 that is damaged ({error!s:.300}); codistill 0.3.0 can repair "
            "it (codistill-cache repair), after which this version can convert it"
        ) from error


def _ledger(store: Store, writer: str, identity: str) -> Ledger:
    """A row is a line of the ledger's file, or an object in its folder; one that ends too soon was never published."""
    objects = [f"{LEDGER}/{writer}/{name}" for name in store.names(f"{LEDGER}/{writer}")]
    files = [f"{LEDGER}/{writer}.jsonl"] if f"{writer}.jsonl" in store.names(LEDGER) else []
    lines = [line for data in store.map(store.read, files + objects) for line in data.splitlines(keepends=True)]
    lines = lines[:-1] if lines and not lines[-1].endswith((b"\n", b"}")) else lines
    ledger = Ledger(writer, [], [], False)
    for seq, line in enumerate(lines):
        row = unseal(line)
        if (row["writer"], row["seq"], row["cache"]) != (writer, seq, identity):
            raise ValueError(f"row {seq} of ledger {writer} is of another place")
        if row["kind"] == "shard":
            ledger.shards.append(row | {"origins": [checked(Origin, each) for each in row["origins"]]})
        elif row["kind"] == "retire":
            ledger.retired.extend(Replaced(each["ledger"], each["first"], each["last"]) for each in row["retired"])
        ledger = ledger._replace(is_finished=row["kind"] == "finish")
    return ledger


class OldShard:
    """The verified index of a shard, and its records."""

    def __init__(self, store: Store, header: CacheHeader, row: dict[str, Any]):
        self.row, self._store, self._name = row, store, f"{SHARDS}/{row['shard']}"
        data = store.read_at(self._name, 0, row["index_bytes"])
        if digest(data) != row["index_digest"]:
            raise ValueError(f"the index of {self._name} does not verify")
        front = 8 + int.from_bytes(data[:8], "little")
        layout, arrays = json.loads(data[8:front]), dict[str, Array]()
        for name, (kind, width) in COLUMNS.items():
            start, end = layout[name]["data_offsets"]
            arrays[name] = np.frombuffer(data[front + start : front + end], f"<{kind[0].lower()}{width}")
        wide = (arrays[name].astype(np.int64) for name in ("steps", "atoms", "origins"))
        self.columns = Columns(arrays["sample_ids"], arrays["digests"], *wide)
        self._checks, self._ends = arrays["checks"].tolist(), arrays["ends"].tolist()
        ids = self.columns.sample_ids
        if front + layout[RECORDS]["data_offsets"][0] != len(data) or not 0 <= ids.min() <= ids.max() < header.samples:
            raise ValueError(f"the columns of {self._name} do not fit")

    def records(self) -> list[bytes]:
        """All records, verified."""
        data = self._store.read_at(self._name, self.row["index_bytes"], self._ends[-1])
        records = [data[start:end] for start, end in pairwise([0, *self._ends])]
        if list(map(check, *(each.tolist() for each in self.columns[:2]), records)) != self._checks:
            raise ValueError(f"a record of {self._name} does not verify")
        return records


def _newest(store: Store, header: CacheHeader, rows: Sequence[dict[str, Any]]) -> list[Array]:
    """For each shard the places in it of the records that count."""
    parts = [np.empty(0, ENTRY)]
    for number, row in enumerate(rows):  # by writer and number, the later of which counts where steps are the same
        columns = OldShard(store, header, row).columns
        parts.append(np.zeros(len(columns.steps), ENTRY))
        parts[-1]["sample"], parts[-1]["step"] = columns.sample_ids, columns.steps
        parts[-1]["origin"], parts[-1]["start"] = number, np.arange(len(columns.steps))
    table = np.sort(newest(np.concatenate(parts), np.arange(len(rows))), order=["origin", "start"])
    return np.split(table["start"], np.searchsorted(table["origin"], np.arange(1, len(rows))))


def _copy(
    store: Store, header: CacheHeader, rows: Sequence[dict[str, Any]], places: list[Array], there: View, packer: Packer
) -> int:
    """Publishes the records that count and that `there` lacks, by the teacher's steps; returns how many."""
    decoder, copied, seen = TokenCounter(store, header), 0, LossSums()
    known = set(there.losses.teachers())
    with advancing("convert", sum(row["bytes"] for row in rows)) as advance:
        for number, row in sorted(enumerate(rows), key=lambda each: min(o.first_step for o in each[1]["origins"])):
            with _refused(store):
                shard = OldShard(store, header, row)
                columns, records = shard.columns, shard.records()
                losses, tokens = decoder.sums(columns, records, row["origins"])
            keep = places[number]
            keep = keep[there.find(columns.sample_ids[keep]).steps < columns.steps[keep]]
            if len(keep):
                kept, sums = columns.take(keep), np.bincount(columns.origins[keep], tokens[keep]).astype(int).tolist()
                part = part_of(kept, [records[i] for i in keep], row["origins"], sums)
                packer.add(part._replace(losses=losses_of(part, known, decoder)))
            seen.update(losses)
            copied += len(keep)
            advance(row["bytes"])
        packer.add(NOTHING._replace(losses=seen.without(known)))
        packer.flush()
    return copied
