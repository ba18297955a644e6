"""Whatever lies in a cache's files, with digests that verify or not: it is read, or a CacheError says what is wrong.

Never another error, a hang, or memory out of proportion.
"""

import contextlib
import json
import random
import resource
import signal
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.cache import CacheReader, CacheWriter
from distill.cache.loss_curve import LossSums
from distill.cache.open_store import open_store
from distill.cache.shard_header import Replaced
from distill.cache.tail import Ranges, next_seq
from distill.config.errors import CacheError
from distill.config.registry import CODECS
from distill.config.schema import CodecConfig
from distill.tools.repair import repair
from distill.tools.verify import verify
from tests.hostile import CacheParts, seal, spans
from tests.workers.cache_writers import V, header, put

FAST = settings(max_examples=150, suppress_health_check=list(HealthCheck))
ROOM = 64 << 20
"""Bytes of memory that a small cache may take, whatever it says."""
SECONDS = 20.0
"""Of work, not of the clock, after which a reader counts as hanging: thousands of times what it needs."""
CACHES = CODECS.names

DEEP = "[" * 800 + "]" * 800
INTS = st.sampled_from(
    [-1, 0, 1, 2, 255, 2**15, 2**24, 2**31, 2**32 - 1, 2**32, 2**47, 2**60, 2**62, 2**63, 2**64, -(2**63), 10**40]
)
VALUES = st.one_of(
    st.none(), st.booleans(), INTS, INTS, st.integers(), st.integers(0, 100),
    st.floats(), st.text(max_size=8),
    st.sampled_from(["", "..", "/etc", "a\0b", "\ud800", "x" * 300, "w" * 5000, ".", "NaN"]),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.builds(json.loads, st.just(DEEP)),
)  # fmt: skip


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """A small cache of each codec, in pieces."""
    found = {}
    for codec in CACHES:
        folder = tmp_path_factory.mktemp(codec)
        config = CodecConfig(codec)
        with CacheWriter(folder, header(config), writer="w", counts_V=np.arange(V) % 7, shard_samples=4) as writer:
            for first in (0, 2, 4, 6):
                put(writer, [first, first + 1], config)
            writer.finish()
        found[codec] = CacheParts.of(folder)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile") / "cache"


def use(folder):
    """Everything that reads; True if all of it was possible."""
    with limits():
        try:
            reader = CacheReader(folder)
            _ = reader.view, reader.finished, reader.frontier, reader.losses, reader.summary
            reader.stats()
            ids = np.arange(min(reader.header.samples, 50))
            covered = ids[reader.covers(ids)]
            reader.origins(ids)
            for sample in covered:
                reader.read(np.array([sample]), reader.digests([sample]))
            reader.decode(list(reader.samples()))
            next_seq(open_store(folder), reader.header, "w", {})
        except CacheError as error:
            assert len(str(error)) < 3000
            return False
    return True


@contextlib.contextmanager
def limits():
    """Within the block little memory and little time is left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

    def late(*_):
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def test_untouched_caches_are_read(caches, folder):
    for parts in caches.values():
        parts.write(folder)
        assert use(folder) or parts.header["format"] == 1  # which cannot be added to


def change(draw, record):
    """One or two values anywhere in a JSON object become others, or go, or come."""
    for _ in range(draw(st.integers(1, 2))):
        at, key = record, None
        while isinstance(at, dict | list) and len(at):
            parent = at
            key = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
            at = at[key]
            if draw(st.booleans()):
                break
        if key is None:
            return
        match draw(st.sampled_from(["set", "set", "set", "drop", "add"])):
            case "set":
                parent[key] = draw(VALUES)
            case "drop":
                del parent[key]
            case "add" if isinstance(parent, dict):
                parent[draw(st.text(max_size=5))] = draw(VALUES)
            case "add":
                parent.append(draw(VALUES))


def drawn(data, caches):
    return caches[data.draw(st.sampled_from(CACHES))].copy()


@FAST
@given(st.data())
def test_headers(caches, folder, data):
    parts = drawn(data, caches)
    change(data.draw, parts.header)
    parts.write(folder)
    use(folder)


@FAST
@given(st.data())
def test_shard_headers(caches, folder, data):
    """Any values in a sealed header, of targets or of a mark."""
    parts = drawn(data, caches)
    for _ in range(data.draw(st.integers(1, 2))):
        change(data.draw, parts.shards[data.draw(st.integers(0, len(parts.shards) - 1))][1])
    parts.keep_digests = data.draw(st.booleans())
    parts.write(folder)
    use(folder)


@FAST
@given(st.data())
def test_replaced_ranges(caches, folder, data):
    """Of any numbers; as many as a header can hold."""
    parts = drawn(data, caches)
    each = st.fixed_dictionaries({"writer": st.sampled_from(["w", "v", ""]), "first": INTS, "last": INTS})
    many = [
        {"writer": "w", "first": 2**40 + 2 * i, "last": 2**40 + 2 * i}
        for i in range(data.draw(st.sampled_from([0, 0, 2000])))
    ]
    record = dict(parts.shards[1][1]) | {"writer": "compact", "seq": 0}
    record["replaces"] = data.draw(st.lists(each, max_size=3)) + many
    if data.draw(st.booleans()):
        change(data.draw, record)
    parts.shards.append(("shards/compact/000000/000000000.safetensors", record, parts.shards[1][2]))
    parts.write(folder)
    use(folder)


@FAST
@given(st.data())
def test_snapshots_and_listings(caches, folder, data):
    """Any values in a sealed snapshot or footer, any numbers in entries and origin rows, with digests that verify."""
    parts = drawn(data, caches)
    listing = parts.listing
    match data.draw(st.sampled_from(["snapshot", "footer", "entries", "rows", "lengths"])):
        case "snapshot":
            change(data.draw, parts.snapshot)
        case "footer":
            change(data.draw, listing.footer)
        case "lengths":
            listing.entries = listing.entries * data.draw(st.integers(0, 3))
            listing.rows = listing.rows[: data.draw(INTS)]
        case name:
            body = getattr(listing, name)
            for _ in range(data.draw(st.integers(1, 3))):
                width = data.draw(st.sampled_from([1, 2, 4, 8]))
                at = data.draw(st.integers(0, max(len(body) - width, 0)))
                value = data.draw(st.one_of(INTS, st.integers(0, 300))) % 256**width
                body = body[:at] + value.to_bytes(width, "little") + body[at + width :]
            setattr(listing, name, body)
    parts.write(folder)
    use(folder)


@FAST
@given(st.data())
def test_index_columns(caches, folder, data):
    """Numbers of any column, of any size, with checks that verify."""
    parts = drawn(data, caches)
    name, record, body = parts.shards[1]
    columns = spans(record["samples"])
    for _ in range(data.draw(st.integers(1, 3))):
        start, end = columns[data.draw(st.sampled_from(sorted(columns)))]
        width = data.draw(st.sampled_from([1, 2, 4, 8]))
        at = data.draw(st.integers(start, max(end - width, start)))
        value = data.draw(st.one_of(INTS, st.integers(0, 300))) % 256**width
        body = body[:at] + value.to_bytes(width, "little") + body[at + width :]
    parts.shards[1] = name, record, body
    parts.write(folder)
    use(folder)


@FAST
@given(st.data())
def test_records(caches, folder, data):
    """Bytes of any record, with checks that verify and any count of atoms."""
    parts = drawn(data, caches)
    parts.has_catalog = False
    name, record, body = parts.shards[1]
    count = record["samples"]
    columns = spans(count)
    garbage = data.draw(
        st.one_of(st.binary(min_size=1, max_size=300), st.sampled_from([b"\0" * 200, b"\xff" * 200, b"\0" * 40_000]))
    )
    body = body[: columns["origins"][1]] + garbage
    sizes = [*sorted(data.draw(st.integers(0, len(garbage))) for _ in range(count - 1)), len(garbage)]
    atoms = [data.draw(st.one_of(st.integers(0, 40), st.integers(0, 2**32 - 1))) for _ in range(count)]
    for column, numbers in (("ends", sizes), ("atoms", atoms)):
        start = columns[column][0]
        body = body[:start] + struct.pack(f"<{count}I", *numbers) + body[start + 4 * count :]
    record |= {"records": len(garbage), "atoms": sum(atoms)}
    parts.shards[1] = name, record, body
    if data.draw(st.booleans()):
        parts.header["sample_tokens"] = data.draw(st.sampled_from([1, 2, 1000, 2**16, 2**24]))
    parts.write(folder)
    use(folder)


@FAST
@given(st.data())
def test_ranks(caches, folder, data):
    """The table of ranks, its digest in the header."""
    from tests.hostile import digest

    parts = drawn(data, caches)
    (front,) = struct.unpack("<Q", parts.ranks[:8])
    table, body = json.loads(parts.ranks[8 : 8 + front]), parts.ranks[8 + front :]
    match data.draw(st.sampled_from(["header", "body", "bytes"])):
        case "header":
            change(data.draw, table)
        case "body":
            at = data.draw(st.integers(0, len(body) - 4))
            body = body[:at] + struct.pack("<I", data.draw(INTS) % 2**32) + body[at + 4 :]
        case "bytes":
            body = data.draw(st.binary(max_size=300))
    text = json.dumps(table).encode()
    parts.ranks = struct.pack("<Q", data.draw(st.sampled_from([len(text)] * 5 + [0, 2**62, 2**64 - 1]))) + text + body
    parts.header["ranks"] = digest(parts.ranks)
    if data.draw(st.booleans()):
        parts.header["vocab_size"] = data.draw(st.sampled_from([2, 63, 65, 2**24]))
    parts.write(folder)
    use(folder)


@FAST
@given(st.data())
def test_any_bytes_in_any_file(caches, folder, data):
    """Nothing made to verify: files cut, emptied, filled, spliced, or swapped."""
    parts = drawn(data, caches)
    parts.write(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole)))
    match data.draw(st.sampled_from(["cut", "fill", "insert", "other", "bytes", "twice"])):
        case "cut":
            path.write_bytes(whole[:at])
        case "fill":
            path.write_bytes(whole[:at] + data.draw(st.binary(max_size=20)) + whole[at + 20 :])
        case "insert":
            path.write_bytes(whole[:at] + data.draw(st.binary(max_size=20)) + whole[at:])
        case "other":
            path.write_bytes(data.draw(st.sampled_from(files)).read_bytes())
        case "bytes":
            path.write_bytes(data.draw(st.binary(max_size=100)))
        case "twice":
            path.write_bytes(whole + whole)
    use(folder)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("writer",), "a\0b"), (("writer",), "\ud800"), (("writer",), ".."), (("origins", 0, "loss"), "much"),
        (("origins", 0, "loss"), float("nan")), (("origins", 0, "last_step"), 2**70), (("records",), True),
        (("last_sample",), None), (("origins", 0, "seen_before"), 3), (("records",), 2**62), (("samples",), 2**60),
        (("losses", 0, 3), 0), (("losses", 0, 4), 2**80), (("kind",), "retire"), (("step",), -2), (("seq",), 2),
        (("replaces",), [{"writer": "w", "first": "x", "last": 1}]), (("replaces",), [7]),
    ],
)  # fmt: skip
def test_values_that_no_header_has(caches, folder, place, value):
    parts = caches["systematic"].copy()
    parts.has_catalog = False
    at = parts.shards[1][1]
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    parts.write(folder)
    assert not use(folder)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("number",), 1), (("cache",), "0" * 16), (("streams", "w", "count"), "x"), (("listings",), [7]),
        (("listings", 0, "entries"), "7"), (("format",), 2),
    ],
)  # fmt: skip
def test_values_that_no_snapshot_has(caches, folder, place, value, caplog):
    """It is named, and the shards serve."""
    parts = caches["systematic"].copy()
    at = parts.snapshot
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    parts.write(folder)
    if place == ("cache",):
        (folder / "catalog" / "000000000.json").write_bytes(seal(parts.snapshot, indent=1))
    assert use(folder) and "000000000.json" in caplog.text


@FAST
@given(st.data())
def test_tools_on_any_bytes(caches, folder, data):
    """A shard or a file of the catalog of any content: `verify` names it, and `repair` ends with a whole cache."""
    parts = drawn(data, caches)
    if data.draw(st.booleans()):
        change(data.draw, parts.shards[data.draw(st.integers(0, len(parts.shards) - 1))][1])
    if data.draw(st.booleans()):
        change(data.draw, parts.snapshot)
    if data.draw(st.booleans()):
        change(data.draw, parts.listing.footer)
    name, at = data.draw(st.sampled_from(["entries", "rows"])), data.draw(st.integers(0, 150))
    body = getattr(parts.listing, name)
    setattr(parts.listing, name, body[:at] + data.draw(st.binary(max_size=8)) + body[at + 8 :])
    parts.write(folder)
    with limits():
        try:
            found = verify(open_store(folder))
            repair(open_store(folder))
        except CacheError:
            return
        assert len(found.problems) < 1000 and verify(open_store(folder)).problems == []


def test_many_replaced_ranges_take_no_time():
    """A quadratic search over 20,000 shards and ranges would take minutes."""
    rng = random.Random(0)
    firsts = [rng.randrange(20_000) for _ in range(20_000)]
    replaced = [Replaced("w", first, first + rng.randrange(2)) for first in firsts if first % 3]
    gone = {n for each in replaced for n in range(each.first, each.last + 1)}
    with limits():
        ranges = Ranges(replaced)
        assert [i for i in range(20_000) if ("w", i) not in ranges] == [i for i in range(20_000) if i not in gone]


def test_sums_of_losses_of_any_size_stay_exact(caches, folder):
    assert LossSums.of([["t", "capture", 5, 2**40, 2**60]]).json() == [["t", "capture", 5, 2**40, 2**60]]
