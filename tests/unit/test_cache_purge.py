"""Purges, snapshots of tools, and the disks that tools work on."""

import errno
import itertools
import os
import time
from types import SimpleNamespace

import numpy as np
import pytest

from distill.cache import CacheHeader, CacheReader, CacheWriter, cataloging
from distill.cache.format import TOOLS
from distill.cache.open_store import open_store
from distill.cache.snapshot import load_snapshot, snapshot_numbers
from distill.config.errors import CacheError
from distill.tools.commands import main
from distill.tools.compact import compact
from distill.tools.merge import merge
from distill.tools.purge import age
from tests import format_reader
from tests.tool_caches import counting, files, two_writers, write
from tests.workers.cache_writers import SAMPLES, V, digests, header, put

MB = 1_000_000


@pytest.fixture
def cache(tmp_path):
    return two_writers(tmp_path / "cache")


def test_purge(cache):
    """Readers of an old view get a clear error, a writer resumes, and what counts is untouched."""
    old, before = CacheReader(cache), format_reader.cache(cache)
    view = old.view
    compact(open_store(cache), shard_bytes=MB)
    assert CacheReader(cache, view).read(np.array([5]), digests([5])).step_B.tolist() == [0]
    assert compact(open_store(cache), shard_bytes=MB, purge_age=3600).purged.shards == 0
    done = compact(open_store(cache), shard_bytes=MB, purge_age=0)
    assert done.purged.shards == 5 and done.purged.bytes > 0 and done.copied == done.waiting == 0
    # Marks of both writers, and one shard.
    assert files(cache) == [("a", 0), ("a", 3), ("b", 0), ("b", 4), ("compact", 0)]
    assert format_reader.cache(cache) == before
    with pytest.raises(CacheError, match=r"compact --purge.*refresh the reader"):
        old.read(np.array([5]), digests([5]))
    with pytest.raises(CacheError, match=r"compact --purge"):
        CacheReader(cache, view)
    assert old.refresh() == 1 and old.read(np.array([5]), digests([5])).step_B.tolist() == [0]
    with CacheWriter(cache, header(), writer="b") as writer:
        put(writer, [5], step=0, teacher="x")  # done before: passed over
        put(writer, [33], step=1)
        writer.flush()
        assert writer.stats.passed == 1 and writer.stats.samples == 1
    assert CacheReader(cache).stats()["shards"] == 2


def at(monkeypatch, days):
    """Snapshots are made, and purges done, on this day."""
    now = time.time()
    monkeypatch.setattr("distill.cache.snapshot.time", SimpleNamespace(time=lambda: now + days * 86400))
    monkeypatch.setattr("distill.tools.purge.time", SimpleNamespace(time=lambda: now + days * 86400))


def test_a_purge_spares_what_views_of_an_age_could_read(cache, monkeypatch):
    views, targets, head = [], [], CacheHeader.load(cache)

    def view():
        views.append(CacheReader(cache).view)
        targets.append([CacheReader(cache).read(np.arange(SAMPLES), digests(np.arange(SAMPLES))).step_B.tolist()])

    def readable():
        """Views that give what they gave when they were made."""
        found = []
        for number, (each, want) in enumerate(zip(views, targets)):
            try:
                reader = CacheReader(cache, each)
                assert [reader.read(np.arange(SAMPLES), digests(np.arange(SAMPLES))).step_B.tolist()] == want
                found.append(number)
            except CacheError as error:
                assert "compact --purge" in str(error)
        return found

    at(monkeypatch, 0)
    compact(open_store(cache), shard_bytes=MB)
    view()
    for day in (4, 9):
        at(monkeypatch, day)
        write(cache, f"c{day}", [([day], 10 + day, "x")])
        view()
        compact(open_store(cache), shard_bytes=MB)
        view()
    assert readable() == [0, 1, 2, 3, 4] and len(snapshot_numbers(open_store(cache))) >= 5
    for limit, day, left in ((10, 9.5, 5), (6, 9.5, 5), (1, 9.5, 3), (3, 11.5, 3), (2, 11.5, 1), (0, 11.5, 1)):
        at(monkeypatch, day)
        done = compact(open_store(cache), shard_bytes=MB, purge_age=limit * 86400)
        assert readable() == list(range(5 - left, 5)) and done.copied == 0
    assert len(snapshot_numbers(open_store(cache))) == 1 == len(list((cache / "catalog").glob("*.listing")))
    assert [place for place in files(cache) if place[0] == "compact"] == [("compact", 2)]
    before = format_reader.cache(cache)
    cataloging.update(open_store(cache), head, is_rebuilding=True)
    assert format_reader.cache(cache) == before and len(before) == 10


def test_a_purge_removes_what_killed_processes_left_in_the_catalog(cache):
    left = [
        cache / "catalog" / name for name in ("0123456789abcdef.listing", ".f.listing.7.tmp", "000000009.json.7-a.tmp")
    ]
    for path in left:
        path.write_bytes(b"x")
    compact(open_store(cache), shard_bytes=MB, purge_age=0)
    assert all(path.exists() for path in left)  # they may be another process's work
    for path in left:
        os.utime(path, (1, 1))
    compact(open_store(cache), shard_bytes=MB, purge_age=0)
    assert not any(path.exists() for path in left) and len(format_reader.cache(cache)) == 9


@pytest.mark.parametrize(
    "text, found", [("7d", 604800), ("12h", 43200), ("5m", 300), ("9s", 9), ("0", 0), ("3", None), ("d", None)]
)
def test_ages(text, found, cache, capsys):
    if found is None:
        with pytest.raises(SystemExit) as stop:
            main(["compact", str(cache), "--purge", text])
        assert stop.value.code == 2 and "is not an age like 7d, 12h" in capsys.readouterr().err
    else:
        assert age(text) == found and main(["compact", str(cache), "--purge", text]) == 0


def test_after_a_purge_the_whole_catalog_may_be_lost(tmp_path, monkeypatch):
    """Streams that begin and end with shards that are gone go on, and nothing is read of what was replaced."""
    write(tmp_path, "z", [([1, 2], 0, "x")])
    with CacheWriter(tmp_path, header(), writer="a", counts_V=np.arange(V) % 7) as writer:
        for step, ids in enumerate(([3], [1, 4], [5])):
            put(writer, ids, step=step)
            writer.flush()
    before, losses = format_reader.cache(tmp_path), CacheReader(tmp_path).losses
    for _ in range(2):  # compact's own stream then begins with a shard that is gone
        compact(open_store(tmp_path), shard_bytes=MB, purge_age=0)
        with CacheWriter(tmp_path, header(), writer="c", counts_V=np.arange(V) % 7) as writer:
            put(writer, [20 + len(before)], step=7)
        losses.update(counting(tmp_path)[-1].losses)
        before = format_reader.cache(tmp_path)
    for path in (tmp_path / "catalog").iterdir():
        path.unlink()
    reader = CacheReader(tmp_path)
    assert reader.view["snapshot"] == -1 and reader.losses == losses and format_reader.cache(tmp_path) == before
    assert np.flatnonzero(reader.covers(np.arange(SAMPLES))).tolist() == sorted(before)
    with CacheWriter(tmp_path, header(), writer="a", index_every=1) as writer:
        put(writer, [39], step=9)
    assert ("a", 4) in files(tmp_path) and ("a", 1) not in files(tmp_path)
    assert reader.refresh() >= 1 and CacheReader(tmp_path).view["snapshot"] == 0
    for each in (reader, CacheReader(tmp_path)):  # the snapshot that the writer made has all, what tools wrote too
        assert np.flatnonzero(each.covers(np.arange(SAMPLES))).tolist() == sorted([*before, 39])
    assert format_reader.cache(tmp_path).items() >= before.items()
    monkeypatch.setattr(cataloging, "PIECE", 1)  # a shard at a time, those before what replaces them and those after it
    before, losses = format_reader.cache(tmp_path), reader.losses
    made = cataloging.update(open_store(tmp_path), CacheHeader.load(tmp_path), is_rebuilding=True)
    assert sum(ref.entries for ref in made.listings) == len(before) and format_reader.cache(tmp_path) == before
    assert CacheReader(tmp_path).losses == losses


# ---------------------------------------------------------------- catalog


def test_a_snapshot_is_of_the_newest_one(cache, monkeypatch):
    """Another process makes one while this one works: its number is taken, and nothing of it is lost."""
    head, store = CacheHeader.load(cache), open_store(cache)
    real, is_first = cataloging.read_tail, itertools.count()

    def meanwhile(*args, **kwargs):
        if next(is_first) == 0:
            compact(open_store(cache), shard_bytes=MB)
        return real(*args, **kwargs)

    write(cache, "d", [([33], 9, "x")], index_every=10**6)
    cataloging.update(store, head)
    before = format_reader.cache(cache)
    with CacheWriter(cache, header(), writer="e", counts_V=np.arange(V) % 7, index_every=10**6) as writer:
        put(writer, [34], step=3)
        writer.flush()
        monkeypatch.setattr(cataloging, "read_tail", meanwhile)
        made = cataloging.update(store, head, ["e"])
        monkeypatch.undo()
    assert made.streams["compact"].count == 1 and made.number == max(snapshot_numbers(store))
    assert sorted(format_reader.cache(cache)) == sorted([*before, 34]) and len(counting(cache)) == 1
    snapshots = [load_snapshot(store, head.identity, number) for number in snapshot_numbers(store)]
    named = {ref.name.removeprefix("catalog/") for snapshot in snapshots for ref in snapshot.listings}
    assert {path.name for path in (cache / "catalog").glob("*.listing")} == named


def test_index(cache, capsys, caplog):
    for path in (cache / "catalog").iterdir():
        path.unlink()
    before = format_reader.cache(cache)
    assert main(["index", str(cache)]) == 0 and "snapshot 0 lists 9 samples" in capsys.readouterr().out
    assert CacheReader(cache).view == {"snapshot": 0, "streams": {"a": 4, "b": 5}}
    assert main(["index", str(cache)]) == 0 and snapshot_numbers(open_store(cache)) == [0]
    (listing,) = (cache / "catalog").glob("*.listing")
    data = bytearray(listing.read_bytes())
    data[3] ^= 1
    listing.write_bytes(data)
    assert main(["index", str(cache)]) == 0 and format_reader.cache(cache) == before
    assert "index" in caplog.text and listing.name in caplog.text and snapshot_numbers(open_store(cache)) == [1, 0]
    assert main(["index", str(cache), "--rebuild"]) == 0 and format_reader.cache(cache) == before
    assert main(["compact", str(cache)]) == 0 and len(counting(cache)) == 1 and format_reader.cache(cache) == before


def test_names_of_tools_are_no_writers(cache):
    for name in TOOLS:
        with pytest.raises(CacheError, match=f"writer is '{name}'"):
            CacheWriter(cache, header(), writer=name)


# ---------------------------------------------------------------- disks


def test_tools_look_for_room_first(cache, tmp_path, monkeypatch):
    before, there = format_reader.cache(cache), files(cache)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=10, f_frsize=100))
    with pytest.raises(CacheError, match=r"the compaction needs .* kB, and its disk has 1\.00 kB left"):
        compact(open_store(cache), shard_bytes=MB)
    with pytest.raises(CacheError, match="the merge needs"):
        merge([open_store(cache)], open_store(tmp_path / "new"), shard_bytes=MB)
    assert files(cache) == there and files(tmp_path / "new") == [] and format_reader.cache(cache) == before
    monkeypatch.undo()
    assert merge([open_store(cache)], open_store(tmp_path / "new"), shard_bytes=MB).copied == 9
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=0, f_frsize=100))
    assert merge([open_store(cache)], open_store(tmp_path / "new"), shard_bytes=MB).copied == 0


def test_looking_needs_no_disk_that_can_be_written(cache, tmp_path, monkeypatch, capsys):
    real = os.open

    def read_only(path, flags, *args, **kwargs):
        if str(path).startswith(str(cache)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, flags, *args, **kwargs)

    there = sorted(cache.rglob("*"))
    monkeypatch.setattr(os, "open", read_only)
    for command in (
        ["stats", str(cache), "--deep", "3"], ["stats", str(cache), "--quick"], ["compare", str(cache), str(cache)],
        ["export", str(cache), str(tmp_path / "x.parquet")],
    ):  # fmt: skip
        assert main(command) == 0, capsys.readouterr().err
    assert main(["compact", str(cache)]) == 2 and "Read-only file system" in capsys.readouterr().err
    assert sorted(cache.rglob("*")) == there
