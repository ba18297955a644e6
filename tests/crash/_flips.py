"""Single bits flipped in every kind of file of a cache; each must be found, and named, before anything is used."""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill.cache import CacheReader, CacheWriter
from distill.cache.ledger import Retired
from distill.cache.open_store import open_store
from distill.cache.shard import Shard
from distill.config.errors import CacheError
from distill.config.registry import CODECS
from distill.config.schema import CodecConfig
from distill.config.terminal import Progress
from tests.crash import _checker as checker
from tests.workers.cache_writers import V, digests, header, put

SAMPLES = 24
KINDS = ("cache.json", "ranks", "ledger lines", "ledger objects", "shard index", "shard records")


class FlipPlace(NamedTuple):
    """Some bytes of a file, and what is read to find a flip among them."""

    kind: str
    path: Path
    start: int
    end: int
    sample: int | None
    """Whose record it is."""


def run(flips: int, seed: int, progress: Progress) -> tuple[dict[str, Any], list[str]]:
    """Flips `flips` bits, one at a time; counts by name, and every problem in words."""
    rng, counts, problems = random.Random(seed), Counter[str](), list[str]()
    with tempfile.TemporaryDirectory(prefix="crash-") as scratch:
        caches = []
        for codec in CODECS.names:
            folder = Path(scratch) / codec
            make(folder, codec)
            caches.append((folder, _Reading(folder), places(folder)))
        for number in range(flips):
            folder, reading, there = caches[number % len(caches)]
            kind = KINDS[number // len(caches) % len(KINDS)]
            place = rng.choice([p for p in there if p.kind == kind])
            at, bit = rng.randrange(place.start, place.end), rng.randrange(8)
            how = reading.find_open if rng.random() < 0.3 and place.sample is not None else reading.find
            with flipped(place.path, at, bit):
                verdict = how(place)
            counts[kind] += 1
            counts["flips"] += 1
            if verdict:
                counts[verdict.split(":")[0]] += 1
                problems.append(f"{verdict} ({place.path.relative_to(scratch)}, byte {at}, bit {bit})")
            progress.update("flips", number + 1, flips, amount=1)
        for _, reading, _ in caches:
            reading.check()  # all that was flipped was flipped back
    keys = ("flips", *KINDS, "unnoticed", "not named", "crashed")
    return {key: counts[key] for key in keys}, problems


def make(folder: Path, name: str) -> None:
    """Two ledgers of lines and one of objects; records that newer ones replace; a `retire` and a `finish` row."""
    codec = CodecConfig(name)
    head = header(codec, samples=SAMPLES)
    with CacheWriter(folder, head, writer="a", counts_V=np.arange(V) % 7, shard_samples=4) as writer:
        for first in range(0, 12, 2):
            put(writer, [first, first + 1], codec, step=first)
        writer.finish()
    with CacheWriter(folder, head, writer="b", shard_samples=2, source="backfill") as writer:
        for first in range(9, 16, 2):
            put(writer, [first, first + 1], codec, step=50)
    # A folder of objects, as an object store has it, may lie on a disk: what is put there goes on as objects.
    (folder / "ledger" / "c").mkdir()
    (folder / "ledger" / "c" / "seed.tmp").touch()
    with CacheWriter(folder, head, writer="c", shard_samples=2) as writer:
        for first in range(16, 22, 2):
            put(writer, [first, first + 1], codec, step=60)
    with CacheWriter(folder, head, writer="d") as writer:
        put(writer, [0, 1, 2, 3], codec, step=70)
        writer.flush()
        writer._ledger.retire([Retired("a", 0, 0)])


def places(folder: Path) -> list[FlipPlace]:
    """All bytes of a cache, part by part: a kind of file is as likely as another, however small."""
    found = [FlipPlace("cache.json", folder / "cache.json", 0, (folder / "cache.json").stat().st_size, None)]
    found += [FlipPlace("ranks", p, 0, p.stat().st_size, None) for p in folder.glob("ranks-*.safetensors")]
    ledgers = [("ledger lines", p) for p in (folder / "ledger").glob("*.jsonl") if p.stat().st_size]
    ledgers += [("ledger objects", p) for p in (folder / "ledger").glob("*/*.json")]
    found += [FlipPlace(kind, p, 0, p.stat().st_size, None) for kind, p in ledgers]
    for path, row in rows(folder).items():
        found.append(FlipPlace("shard index", path, 0, row["index_bytes"], None))
        columns = checker.load(path.read_bytes())
        ends = [0, *columns["ends"].tolist()]
        for i, sample in enumerate(columns["sample_ids"].tolist()):
            first = row["index_bytes"]
            found.append(FlipPlace("shard records", path, first + ends[i], first + ends[i + 1], sample))
    return found


def rows(folder: Path) -> dict[Path, dict[str, Any]]:
    """Rows of the shards that count, as docs/cache.md defines them, by file."""
    lines = [line for p in (folder / "ledger").glob("*.jsonl") for line in p.read_bytes().splitlines(keepends=True)]
    lines += [p.read_bytes() for p in (folder / "ledger").glob("*/*.json")]
    every = [checker.format_reader.sealed(line) for line in lines]
    gone = {(r["ledger"], n) for row in every for r in row.get("retired", []) for n in range(r["first"], r["last"] + 1)}
    return {
        folder / "shards" / row["shard"]: row
        for row in every
        if row["kind"] == "shard" and (row["writer"], row["seq"]) not in gone
    }


class flipped:
    """One bit of a file, within the block."""

    def __init__(self, path: Path, at: int, bit: int):
        self._path, self._at, self._bit = path, at, bit

    def __enter__(self) -> None:
        self._turn()

    def __exit__(self, *_: object) -> None:
        self._turn()

    def _turn(self) -> None:
        with self._path.open("r+b", buffering=0) as file:
            file.seek(self._at)
            byte = file.read(1)[0]
            file.seek(self._at)
            file.write(bytes([byte ^ 1 << self._bit]))


class _Reading:
    """Uses of one cache: opening it and reading everything, or a sample through a reader that is open already."""

    def __init__(self, folder: Path):
        self._folder, self._store = folder, open_store(folder)
        self._open = CacheReader(folder)
        steps = self._open.steps(np.arange(SAMPLES))
        self._ids = np.flatnonzero(steps >= 0)
        self._truth = self._open.read(self._ids, digests(self._ids))
        self._rows = {self._folder / "shards" / row.shard: row for row in self._open.rows}

    def check(self) -> None:
        again = CacheReader(self._folder).read(self._ids, digests(self._ids))
        for got, want in zip(again.targets, self._truth.targets, strict=True):
            assert got.equal(want)
        assert again.step_B.equal(self._truth.step_B)

    def find(self, place: FlipPlace) -> str | None:
        """Opens the cache anew and uses all of it."""
        return self._verdict(place, lambda: self._use(CacheReader(self._folder), place))

    def find_open(self, place: FlipPlace) -> str | None:
        """The bit has flipped since the cache was opened."""
        return self._verdict(place, lambda: self._use(self._open, place))

    def _use(self, reader: CacheReader, place: FlipPlace) -> None:
        reader.read(self._ids, digests(self._ids))
        # Records that newer ones replace are used by nobody but who checks or rewrites the whole shard.
        if place.sample is not None:
            shard = Shard(self._store, self._rows[place.path])
            shard.records([shard.columns.sample_ids.tolist().index(place.sample)])

    def _verdict(self, place: FlipPlace, use: Callable[[], None]) -> str | None:
        try:
            use()
        except CacheError as error:
            named = place.path.name in str(error) or (place.kind == "ledger objects" and place.path.stem in str(error))
            if place.sample is not None:
                named = named and f"sample {place.sample} " in str(error)
            return None if named else f"not named: {error}"
        except Exception as error:
            return f"crashed: {type(error).__name__} {error}"
        return f"unnoticed: {place.kind}"
