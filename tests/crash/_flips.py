"""Single bits flipped in every kind of file of a cache; each must be found, and named, before anything is used."""

from __future__ import annotations

import logging
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill.cache import CacheReader, CacheWriter
from distill.cache.open_store import open_store
from distill.cache.shard import Shard
from distill.config.errors import CacheError
from distill.config.registry import CODECS
from distill.config.schema import CodecConfig
from distill.config.terminal import Progress
from distill.tools.compact import compact
from tests.crash import _checker as checker
from tests.workers.cache_writers import V, digests, header, put

SAMPLES = 24
KINDS = ("cache.json", "ranks", "snapshots", "listings", "marks", "shard index", "shard records")


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
    """Four writers; begin and end marks; records that newer ones replace; shards that a listing has, and later ones."""
    codec = CodecConfig(name)
    head = header(codec, samples=SAMPLES)
    with CacheWriter(folder, head, writer="a", counts_V=np.arange(V) % 7, shard_samples=4) as writer:
        for first in range(0, 12, 2):
            put(writer, [first, first + 1], codec, step=first)
        writer.finish()
    with CacheWriter(folder, head, writer="b", shard_samples=2, source="backfill") as writer:
        for first in range(9, 16, 2):
            put(writer, [first, first + 1], codec, step=50)
    store = open_store(folder)
    compact(store, shard_bytes=400)
    late = CacheWriter(folder, head, writer="c", shard_samples=2)
    for first in range(16, 22, 2):
        put(late, [first, first + 1], codec, step=60)
    late.flush()
    late._aborted = True  # without a listing, as a kill leaves it
    late._stop()


def places(folder: Path) -> list[FlipPlace]:
    """All bytes of a cache, part by part: a kind of file is as likely as another, however small.

    Of the catalog, the newest snapshot and its listings: others are used for views alone that began with them.
    """
    newest = max(folder.glob("catalog/*.json"))
    listings = [folder / ref["name"] for ref in checker.format_reader.sealed(newest.read_bytes())["listings"]]
    files = [("cache.json", folder / "cache.json"), ("snapshots", newest), *(("listings", path) for path in listings)]
    files += [("ranks", path) for path in folder.glob("ranks-*.safetensors")]
    shards = checker.format_reader.shards(folder)
    paths = {place: folder / "shards" / place[0] / "000000" / f"{place[1]:09d}.safetensors" for place in shards}
    files += [("marks", paths[place]) for place, shard in shards.items() if shard.header["kind"] != "targets"]
    found = [FlipPlace(kind, path, 0, path.stat().st_size, None) for kind, path in files]
    for place, shard in shards.items():
        if shard.header["samples"]:
            found.append(FlipPlace("shard index", paths[place], 0, shard.records_at, None))
        for sample, start, data in zip(shard.columns["sample_ids"], shard.starts, shard.data, strict=True):
            first = shard.records_at + start
            found.append(FlipPlace("shard records", paths[place], first, first + len(data), sample))
    return found


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
        read = reader.read(self._ids, digests(self._ids))
        for got, want in zip(read.targets, self._truth.targets, strict=True):
            assert got.equal(want), "wrong"
        # Nobody but who checks or rewrites the whole shard uses its index where a listing has it, or records that newer
        # ones replace.
        writer, seq = place.path.parts[-3], place.path.stem
        if place.kind in ("marks", "shard index", "shard records"):
            shard = Shard(self._store, reader.header, writer, int(seq))
            if place.sample is not None:
                number = shard.columns.sample_ids.tolist().index(place.sample)
                shard.span(number, number + 1)

    def _verdict(self, place: FlipPlace, use: Callable[[], None]) -> str | None:
        """Damage of the catalog is a warning, and the shards serve."""
        warnings = _Warnings()
        logging.getLogger("distill").addHandler(warnings)
        try:
            use()
        except CacheError as error:
            warnings.lines.append(str(error))
        except Exception as error:
            return f"crashed: {type(error).__name__} {error}"
        finally:
            logging.getLogger("distill").removeHandler(warnings)
        if not warnings.lines:
            return f"unnoticed: {place.kind}"
        text = " ".join(warnings.lines)
        named = place.path.name in text and (place.sample is None or f"sample {place.sample} " in text)
        return None if named else f"not named: {text}"


class _Warnings(logging.Handler):
    """Collects what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
