"""Compaction, merging and comparing, against what a slow reader of the format finds before and after."""

import errno
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from distill.cache import CacheHeader, CacheReader, CacheWriter, catalog
from distill.cache.format import TOOLS
from distill.cache.open_store import open_store
from distill.cache.shard import Shard
from distill.cache.snapshot import load_snapshot, snapshot_numbers
from distill.cache.tail import writers_of
from distill.cache.view import open_view
from distill.config.errors import CacheError
from distill.config.schema import CodecConfig
from distill.tools.commands import COMMANDS, main
from distill.tools.compact import compact
from distill.tools.compare import compare
from distill.tools.merge import merge
from distill.tools.purge import age
from distill.tools.stats import stats
from distill.tools.verify import verify
from tests import format_reader
from tests.workers.cache_writers import SAMPLES, S, V, batch, digests, header, put

MB = 1_000_000


def origins(folder):
    """What each sample's record says of its teacher, by way of a reader; and the mean loss of its shard."""
    reader = CacheReader(folder)
    return {
        sample.sample_id: (sample.step, sample.origin.teacher, sample.origin.source, sample.origin.loss)
        for sample in reader.samples()
    }


def write(folder, writer, parts, **options):
    """parts: (sample ids, step, teacher); one shard each."""
    with CacheWriter(folder, header(), writer=writer, counts_V=np.arange(V) % 7, shard_samples=99, **options) as w:
        for ids, step, teacher in parts:
            put(w, ids, step=step, teacher=teacher)
            w.flush()
        w.finish()


PARTS = [([5, 1, 9], 0, "x"), ([0, 2], 1, "x"), ([7], 2, "x"), ([1, 30, 31], 3, "y"), ([8, 2], 4, "y")]


@pytest.fixture
def cache(tmp_path):
    """Two writers; samples 1 and 2 twice."""
    write(tmp_path / "cache", "b", PARTS[:3])
    write(tmp_path / "cache", "a", PARTS[3:])
    return tmp_path / "cache"


def total_tokens(folder, ids):
    """Tokens with a target, counted from the records."""
    found = format_reader.cache(folder)
    return sum(token is not None for sample in ids for token in found[sample][2])


def shards(folder):
    """Headers of the shards with samples that count, in the order of the catalog."""
    store = open_store(folder)
    head = CacheHeader.load(store)
    view = open_view(store, head)
    return [
        Shard(store, head, names.writers[row["writer"]], int(row["seq"])).header
        for names, rows in view.origin_rows()
        for row in rows[rows["number"] == 0]
    ]


def files(folder):
    """Names of the files of shards, by writer and number."""
    return sorted((path.parts[-3], int(path.stem)) for path in (folder / "shards").glob("*/*/*.safetensors"))


def check_origin_counts(folder):
    """Every origin's samples and tokens are those of the records that point at it."""
    reader = CacheReader(folder)
    counted: dict = {}
    for sample in reader.samples():
        counted.setdefault((sample.shard, sample.origin), []).append(sample.sample_id)
    for (_, origin), ids in counted.items():
        assert origin.samples == len(ids)
        assert origin.tokens == total_tokens(folder, ids)
    assert sum(shard.tokens for shard in shards(folder)) == sum(o.tokens for _, o in counted)


def test_compaction_changes_nothing_that_is_read(cache):
    before, told, order = format_reader.cache(cache), origins(cache), CacheReader(cache)
    losses = order.losses
    old = order.read(np.arange(SAMPLES), digests(np.arange(SAMPLES)))
    done = compact(open_store(cache), shard_bytes=MB)
    assert (done.before, done.after, done.copied, done.dropped) == (5, 1, 9, 2)
    assert format_reader.cache(cache) == before and origins(cache) == told
    check_origin_counts(cache)
    new = CacheReader(cache)
    assert order.refresh() == 1 and order.view == new.view and len(shards(cache)) == 1
    for reader in (order, new):
        result = reader.read(np.arange(SAMPLES), digests(np.arange(SAMPLES)))
        assert all(a.equal(b) for a, b in zip(result.targets, old.targets))
        assert result.shard_loss_B.nan_to_num(-1).equal(old.shard_loss_B.nan_to_num(-1))
        assert result.step_B.equal(old.step_B) and reader.finished and reader.losses == losses
    # In the order of steps.
    assert [s.step for s in new.samples()] == sorted(step for step, *_ in told.values())
    assert compact(open_store(cache), shard_bytes=MB).copied == 0
    assert verify(open_store(cache), decode=True).problems == []


def test_compaction_leaves_large_shards_alone_and_fills_up_to_the_size(tmp_path):
    write(tmp_path, "w", [([i, i + 1, i + 2], i, "x") for i in range(0, 39, 3)])
    limit = 3 * max(shard.records for shard in shards(tmp_path))
    compact(open_store(tmp_path), shard_bytes=limit)
    there = shards(tmp_path)
    assert 4 <= len(there) <= 7 and all(shard.records <= limit for shard in there)
    large = {(shard.writer, shard.seq): shard for shard in there if shard.records >= limit / 2}
    with CacheWriter(tmp_path, header(), writer="w", counts_V=np.arange(V) % 7) as writer:
        put(writer, [39], step=50)
        writer.flush()
        put(writer, [38], step=51)
    before = format_reader.cache(tmp_path)
    touched = {place for place, shard in large.items() if shard.last_sample == 38}
    compact(open_store(tmp_path), shard_bytes=limit)
    left = {(shard.writer, shard.seq) for shard in shards(tmp_path)}
    assert large.keys() - touched <= left
    assert format_reader.cache(tmp_path) == before and len(before) == 40


def test_what_is_superseded_as_a_whole_is_replaced(tmp_path):
    """With the next shard, or by one without samples; its losses stay in the sums."""
    write(tmp_path, "w", [([1, 2], 0, "x"), ([3], 5, "x"), ([1, 2], 6, "x")])
    limit = 2 * max(shard.records for shard in shards(tmp_path)) - 100
    before, losses = format_reader.cache(tmp_path), CacheReader(tmp_path).losses
    assert compact(open_store(tmp_path), shard_bytes=limit).dropped == 2
    with CacheWriter(tmp_path, header(), writer="w", counts_V=np.arange(V) % 7) as writer:
        put(writer, [1, 2, 3], step=9, teacher="x")
    old = {(shard.writer, shard.seq) for shard in shards(tmp_path)}
    losses.update(shards(tmp_path)[-1].losses)
    before = format_reader.cache(tmp_path)
    done = compact(open_store(tmp_path), shard_bytes=10, purge_age=0)
    assert (done.copied, done.dropped, done.after) == (0, 3, 1) and done.purged.shards > 0
    assert len(old & set(files(tmp_path))) == 1
    for _ in range(2):
        assert CacheReader(tmp_path).losses == losses and format_reader.cache(tmp_path) == before
        catalog.update(open_store(tmp_path), CacheHeader.load(tmp_path), is_rebuilding=True)


def test_a_live_reader_and_a_live_writer_go_on_during_a_compaction(cache, monkeypatch):
    """A writer publishes between any two steps of it: none of its shards is lost, and the reader never misses one."""
    reader = CacheReader(cache)
    writer = CacheWriter(cache, header(), writer="b")
    published = iter(range(10, 28))
    seen = {5, 1, 9, 0, 2, 7, 30, 31, 8}

    def meanwhile(real):
        def call(*args, **kwargs):
            result = real(*args, **kwargs)
            if threading.current_thread() is threading.main_thread() and (sample := next(published, None)) is not None:
                put(writer, [sample], step=9)
                writer.flush()
                seen.add(sample)
                reader.refresh()
                ids = np.array(sorted(seen))
                assert reader.covers(ids).all()
                assert reader.read(ids, digests(ids)).targets.covered_T.sum() == len(ids) * (S - 1)
            return result

        return call

    for name in ("repack.publish_shard", "compact.open_view", "compact.shards_of"):
        name = f"distill.tools.{name}"
        module, attribute = name.rsplit(".", 1)
        monkeypatch.setattr(name, meanwhile(getattr(sys.modules[module], attribute)))
    compact(open_store(cache), shard_bytes=500)
    writer.close()
    reader.refresh()
    assert len(seen) > 12
    assert (
        sorted(format_reader.cache(cache)) == sorted(seen) == np.flatnonzero(reader.covers(np.arange(SAMPLES))).tolist()
    )


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
    catalog.update(open_store(cache), head, is_rebuilding=True)
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


def test_after_a_purge_the_whole_catalog_may_be_lost(tmp_path):
    """Streams that begin and end with shards that are gone go on, and nothing is read of what was replaced."""
    write(tmp_path, "b", [([1, 2], 0, "x")])
    with CacheWriter(tmp_path, header(), writer="a", counts_V=np.arange(V) % 7) as writer:
        for step, ids in enumerate(([3], [1, 4], [5])):
            put(writer, ids, step=step)
            writer.flush()
    before, losses = format_reader.cache(tmp_path), CacheReader(tmp_path).losses
    for _ in range(2):  # compact's own stream then begins with a shard that is gone
        compact(open_store(tmp_path), shard_bytes=MB, purge_age=0)
        with CacheWriter(tmp_path, header(), writer="c", counts_V=np.arange(V) % 7) as writer:
            put(writer, [20 + len(before)], step=7)
        losses.update(shards(tmp_path)[-1].losses)
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


# ---------------------------------------------------------------- catalog


def test_a_snapshot_is_of_the_newest_one(cache, monkeypatch):
    """Another process makes one while this one works: its number is taken, and nothing of it is lost."""
    head, store = CacheHeader.load(cache), open_store(cache)
    real, is_first = catalog.read_tail, itertools.count()

    def meanwhile(*args, **kwargs):
        if next(is_first) == 0:
            compact(open_store(cache), shard_bytes=MB)
        return real(*args, **kwargs)

    write(cache, "d", [([33], 9, "x")], index_every=10**6)
    catalog.update(store, head)
    before = format_reader.cache(cache)
    with CacheWriter(cache, header(), writer="e", counts_V=np.arange(V) % 7, index_every=10**6) as writer:
        put(writer, [34], step=3)
        writer.flush()
        monkeypatch.setattr(catalog, "read_tail", meanwhile)
        made = catalog.update(store, head, ["e"])
        monkeypatch.undo()
    assert made.streams["compact"].count == 1 and made.number == max(snapshot_numbers(store))
    assert sorted(format_reader.cache(cache)) == sorted([*before, 34]) and len(shards(cache)) == 1
    snapshots = [load_snapshot(store, head.identity, number) for number in snapshot_numbers(store)]
    named = {ref.name.removeprefix("catalog/") for snapshot in snapshots for ref in snapshot.listings}
    assert {path.name for path in (cache / "catalog").glob("*.listing")} == named


def test_index(cache, capsys):
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
    assert main(["compact", str(cache)]) == 2
    assert "index" in (told := capsys.readouterr().err) and "--rebuild" in told and listing.name in told
    assert main(["index", str(cache), "--rebuild"]) == 0 and format_reader.cache(cache) == before
    assert main(["compact", str(cache)]) == 0 and len(shards(cache)) == 1 and format_reader.cache(cache) == before


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


def test_tools_on_an_object_store():
    url = "memory://tools/cache"
    write(url, "b", PARTS[:3])
    write(url, "a", PARTS[3:])
    told = origins(url)
    store = open_store(url)
    assert compact(store, shard_bytes=MB, purge_age=0).purged.shards == 5
    assert origins(url) == told and store.names("shards/compact/000000") == ["000000000.safetensors"]
    assert merge([store], open_store("memory://tools/other"), shard_bytes=MB).copied == 9
    assert origins("memory://tools/other") == told
    assert compare(store, open_store("memory://tools/other")).same()
    assert stats(store)["samples"] == 9


# ---------------------------------------------------------------- merge


def test_merge(tmp_path):
    """By step; the target's record, then the first source's, where steps are the same; twice is once."""
    write(tmp_path / "x", "w", [([1, 2, 3], 4, "x"), ([10], 9, "x")])
    write(tmp_path / "y", "w", [([3, 4], 4, "y"), ([1], 5, "y"), ([10], 8, "y")])
    write(tmp_path / "all", "w", [([2], 4, "old"), ([4], 7, "old"), ([20], 0, "old")])
    sources = [open_store(tmp_path / name) for name in "xy"]
    done = merge(sources, open_store(tmp_path / "all"), shard_bytes=MB)
    assert (done.copied, done.passed) == (3, 5)
    want = {1: (5, "y"), 2: (4, "old"), 3: (4, "x"), 4: (7, "old"), 10: (9, "x"), 20: (0, "old")}
    assert {sample: told[:2] for sample, told in origins(tmp_path / "all").items()} == want
    check_origin_counts(tmp_path / "all")
    there, losses = files(tmp_path / "all"), CacheReader(tmp_path / "all").losses
    assert merge(sources, open_store(tmp_path / "all"), shard_bytes=MB).copied == 0
    assert files(tmp_path / "all") == there and CacheReader(tmp_path / "all").losses == losses
    assert writers_of(open_store(tmp_path / "all")) == ["merge", "w"]
    # The records are those of the sources, byte for byte.
    x, y, both = (format_reader.cache(tmp_path / name) for name in ("x", "y", "all"))
    assert both[1] == y[1] and both[3] == x[3] and both[10] == x[10]
    fresh = merge(sources, open_store(tmp_path / "new"), shard_bytes=MB)
    want = {(teacher, step) for teacher, _, step, _ in CacheReader(tmp_path / "new").losses.rows()}
    assert want == {("x", 4), ("x", 9), ("y", 4), ("y", 5), ("y", 8)}  # of shards that no record came from, too
    assert fresh.copied == 5 and format_reader.cache(tmp_path / "new")[4] == y[4]
    assert CacheReader(tmp_path / "new").header.stream == CacheReader(tmp_path / "x").header.stream


def test_a_copy_has_the_losses_of_all(cache, tmp_path):
    compact(open_store(cache), shard_bytes=10)
    write(cache, "z", [([5, 1], 7, "x"), ([5, 1], 8, "x")])
    compact(open_store(cache), shard_bytes=10)
    assert main(["compact", str(cache), "--into", str(tmp_path / "new")]) == 0
    assert CacheReader(tmp_path / "new").losses == CacheReader(cache).losses
    assert compare(open_store(cache), open_store(tmp_path / "new")).same()


@pytest.mark.parametrize("spelling", ["{}/cache/", "{}/link", "{}/none/../cache", "file://{}/cache", "{}/link/."])
def test_a_cache_is_not_merged_with_itself(cache, tmp_path, spelling, capsys):
    (tmp_path / "link").symlink_to(cache)
    (tmp_path / "none").mkdir()
    before = files(cache)
    for command in (["merge", str(cache), spelling], ["compact", str(cache), "--into", spelling]):
        assert main([each.format(tmp_path) for each in command]) == 2
        assert "both a source and the target" in capsys.readouterr().err
    assert files(cache) == before


@pytest.mark.parametrize(
    "change, found",
    [
        (dict(corpus="other"), "corpus is 'other' in the cache, 'corp' in this run"),
        (dict(codec=CodecConfig(draws=9), seed=8), r"cache\.codec\.draws is .*9.*\n.*seed is"),
    ],
)
def test_other_caches_are_not_merged(tmp_path, change, found):
    write(tmp_path / "x", "w", [([1], 0, "x")])
    CacheWriter(tmp_path / "y", header(**change), writer="w", counts_V=np.arange(V) % 7).close()
    for sources, target in (("xy", "new"), ("x", "y")):
        with pytest.raises(CacheError, match=found):
            merge([open_store(tmp_path / name) for name in sources], open_store(tmp_path / target), shard_bytes=MB)
    CacheWriter(tmp_path / "z", header(), writer="w", counts_V=np.arange(V) % 5).close()
    with pytest.raises(CacheError, match="ranks"):
        merge([open_store(tmp_path / "x")], open_store(tmp_path / "z"), shard_bytes=MB)


def test_streams_of_other_teachers_are_merged(tmp_path):
    write(tmp_path / "x", "w", [([1], 0, "x")])
    with CacheWriter(tmp_path / "y", header(stream={"seed": 9}), writer="w", counts_V=np.arange(V) % 7) as writer:
        put(writer, [2], step=3)
    merge([open_store(tmp_path / name) for name in "xy"], open_store(tmp_path / "new"), shard_bytes=MB)
    assert sorted(format_reader.cache(tmp_path / "new")) == [1, 2]


# ---------------------------------------------------------------- compare


def test_compare(tmp_path):
    """Against sums over whole rows of what the slow reader decodes."""
    write(tmp_path / "a", "w", [([1, 2, 3], 0, "x"), ([4], 0, "x")])
    write(tmp_path / "b", "w", [([1], 0, "x"), ([2, 3], 5, "y"), ([6, 7], 0, "x")])
    found = compare(open_store(tmp_path / "a"), open_store(tmp_path / "b"))
    assert (found.only_a, found.only_b, found.equal, found.different) == (1, 2, 1, 2)
    assert (found.other_step, found.other_teacher, found.other_tokens) == (2, 2, 0)
    a, b = (format_reader.cache(tmp_path / name) for name in "ab")
    apart, tv, tokens, differ = [], [], 0, 0
    for sample in (1, 2, 3):
        for x, y in zip(a[sample][2], b[sample][2]):
            if x is None:
                continue
            rows = np.zeros((2, V))
            for row, token in zip(rows, (x, y)):
                for i, code in token[3]:
                    row[i] = format_reader.probability(code, {"draws": 20})
            gap = np.abs(rows[0] - rows[1])
            tokens += 1
            differ += x != y
            tv.append(gap.sum() / 2)
            if gap.any():
                apart += gap[rows.any(0)].tolist()
    assert (found.tokens, found.tokens_different, found.tokens_one_side) == (tokens, differ, 0)
    assert found.mean_tv == pytest.approx(np.mean(tv)) and found.largest_tv == pytest.approx(max(tv))
    assert found.mean_p == pytest.approx(np.mean(apart)) and found.largest_p == pytest.approx(max(apart))
    assert not found.same() and not found.same(1.0)
    code = main(["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert code == 1 and main(["compare", str(tmp_path / "a"), str(tmp_path / "a")]) == 0


def test_a_tolerance_is_for_targets_alone(tmp_path):
    write(tmp_path / "a", "w", [([1, 2], 0, "x")])
    write(tmp_path / "b", "w", [([1, 2], 5, "x")])
    found = compare(open_store(tmp_path / "a"), open_store(tmp_path / "b"))
    assert 0 < found.mean_tv < 1 and not found.same()
    assert found.same(found.mean_tv + 1e-9) and not found.same(found.mean_tv * 0.99)
    CacheWriter(tmp_path / "c", header(corpus="other"), writer="w").close()
    with pytest.raises(CacheError, match="corpus is 'other' in the cache, 'corp' in this run"):
        compare(open_store(tmp_path / "a"), open_store(tmp_path / "c"))


# ---------------------------------------------------------------- stats, command line


def test_stats_are_what_was_put(cache):
    found = stats(open_store(cache))
    assert (found["samples"], found["records"], found["shards"]) == (9, 11, 5)
    assert found["tokens"] == 11 * (S - 1) and found["exact"]
    on_disk = sum(shard.bytes for shard in shards(cache))
    assert sum(found["bytes"]["shards"].values()) == on_disk
    assert found["bytes"]["shards"]["sample_ids"] == 8 * 11
    assert found["bytes"]["shards"]["records"] == sum(shard.records for shard in shards(cache))
    assert found["bytes_per_token"] == pytest.approx(on_disk / found["tokens"])
    assert found["bytes"]["others"]["catalog"] == sum(p.stat().st_size for p in (cache / "catalog").iterdir())
    everything = sum(p.stat().st_size for p in (cache / "shards").rglob("*") if p.is_file())
    assert found["bytes"]["others"]["marks"] == everything - on_disk
    losses = [
        -b.label_logprob[b.valid].double().mean().item() for b in (batch(ids, step=step) for ids, step, _ in PARTS)
    ]
    assert [(c["teacher"], c["source"], c["step"]) for c in found["losses"]] == [
        ("x", "capture", [0, 1, 2]), ("y", "capture", [3, 4]),
    ]  # fmt: skip
    assert [loss for c in found["losses"] for loss in c["loss"]] == pytest.approx(losses, rel=1e-5)
    assert [(o["teacher"], o["samples"], o["first_step"], o["last_step"]) for o in found["origins"]] == [
        ("x", 6, 0, 2),
        ("y", 5, 3, 4),
    ]
    streams = [(w["name"], w["count"], w["shards"], w["marks"], w["finished"], w["alive"]) for w in found["writers"]]
    assert streams == [("a", 4, 2, 2, True, False), ("b", 5, 3, 2, True, False)]


def test_quick_stats_are_those_of_the_snapshot_from_its_footers_alone(cache, monkeypatch):
    several = stats(open_store(cache), quick=True)
    assert several["samples"] == 11 and not several["exact"]
    compact(open_store(cache), shard_bytes=MB)
    whole = stats(open_store(cache))
    assert [(w["name"], w["shards"], w["marks"], w["replaced"]) for w in whole["writers"]] == [
        ("a", 0, 2, 2), ("b", 0, 2, 3), ("compact", 1, 0, 0),
    ]  # fmt: skip
    assert whole["bytes"]["of no use"]["replaced by compaction"] > 0
    write(cache, "z", [([33], 9, "x")], index_every=10**6)
    for path in (cache / "catalog").glob("*.json"):
        if path.stem > f"{whole['snapshot']['number']:09d}":
            path.unlink()
    real = os.open
    opened = []
    monkeypatch.setattr(os, "open", lambda path, *args, **kw: (opened.append(str(path)), real(path, *args, **kw))[1])
    quick = stats(open_store(cache), quick=True)
    assert not any("/shards/" in path for path in opened) and any(path.endswith(".listing") for path in opened)
    for name in ("samples", "records", "shards", "tokens", "atoms", "origins", "losses", "flops", "bytes_per_token"):
        assert quick[name] == whole[name], name
    assert quick["exact"] and stats(open_store(cache))["samples"] == 10


def test_the_command_line_of_stats(cache, tmp_path, capsys):
    assert main(["stats", str(cache), "--json", "--deep", "4", "--html", str(tmp_path / "page.html")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["sampled"]["tokens"]
        == sum(found["sampled"]["entropy"]["counts"])
        == found["sampled"]["samples"] * (S - 1)
    )
    assert sum(found["sampled"]["mass"]["counts"]) == found["sampled"]["tokens"]
    text = (tmp_path / "page.html").read_text()
    assert "Teacher&#x27;s loss by its step" in text and text.count("<figure") == 5
    assert main(["stats", str(cache)]) == 0
    assert "9 of 40 samples, 22.50%" in capsys.readouterr().out
    assert main(["stats", str(tmp_path)]) == 0  # a folder that holds caches


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["stats", "{}/none"], "no cache here"),
        (["verify", "{}/none"], "no cache here"),
        (["compact", "{}/cache", "--shard-mb", "0"], "--shard-mb is 0; allowed is 1 to 4000"),
        (["compact", "{}/cache", "--into", "{}/n", "--purge"], "--purge is no option of --into"),
        (["merge", "{}/cache", "{}/cache"], "both a source and the target"),
        (["compare", "{}/cache", "{}/none"], "no cache here"),
        (["stats", "{}/cache", "--deep", "0"], "--deep is 0"),
        (["estimate", "--vocab-size", "100"], "--tokens is missing"),
        (["estimate", "--tokens", "1e6", "--k", "0", "--codec", "topk"], "--k is 0; allowed: 1 to 255"),
        (["estimate", "--tokens", "1e6", "seed=1"], "it needs --config"),
        (["estimate", "--config", "nothing"], "experiment is nothing; allowed: demo"),
    ],
)
def test_faults_are_told_in_a_line_each(cache, tmp_path, capsys, arguments, said):
    assert main([each.format(tmp_path) for each in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and said in captured.err and "Traceback" not in captured.err


def test_what_looks_at_headers_needs_no_torch(cache):
    for command in (
        ["stats", str(cache)], ["verify", str(cache)], ["--help"], ["estimate", "--tokens", "1e9"],
        *([name, "--help"] for name in COMMANDS),
    ):  # fmt: skip
        code = (
            "import sys; from distill.tools.commands import main\n"
            f"try: main({command!r})\nexcept SystemExit: pass\n"
            "print([m for m in ('torch', 'numba', 'pyarrow', 'omegaconf', 'hydra', 'fsspec') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]"
    done = subprocess.run([sys.executable, "-m", "distill.tools", "verify", str(cache)], capture_output=True, text=True)
    assert done.returncode == 0 and "whole" in done.stdout
