"""Files swapped, cut, or of the wrong kind; clocks, names and readers that do not behave."""

import errno
import os
import shutil
import time
from pathlib import Path
from threading import Thread

import fsspec
import numpy as np
import pytest
from distill.cache.ledger import LedgerReader, Retired

from distill.cache import CacheReader, CacheWriter
from distill.cache.local import LocalStore
from distill.cache.view import Newest
from distill.config.errors import CacheError
from tests.cli import PATIENCE
from tests.crash import _checker as checker
from tests.workers.cache_writers import SAMPLES, digests, header, put

ALL = np.arange(SAMPLES)


def write(folder, shards=4, corpus="corp", **changes):
    with CacheWriter(folder, header(corpus=corpus, **changes), writer="w", shard_samples=2) as writer:
        for first in range(0, 2 * shards, 2):
            put(writer, [first, first + 1])
    return folder


def read(folder, ids=ALL):
    reader = CacheReader(folder)
    ids = ids[reader.covers(ids)]
    reader.read(ids, digests(ids))
    return reader


def lines(folder):
    return (folder / "ledger" / "w.jsonl").read_bytes().splitlines(keepends=True)


def refused(folder, match):
    with pytest.raises(CacheError, match=match):
        read(folder)


# ------------------------------------------------------------ swapped


def test_shards_swapped_between_caches(tmp_path):
    """Of equal shape, of equal name: the file alone, the file with its row, the whole ledger."""
    a, b = write(tmp_path / "a"), write(tmp_path / "b", corpus="other")
    for number in range(4):
        (one,), (two,) = (list((f / "shards").glob(f"w-00000{number}-*")) for f in (a, b))
        saved, size = one.read_bytes(), one.stat().st_size
        one.write_bytes(two.read_bytes())
        assert one.stat().st_size == size
        refused(a, rf"{one.name} .*is damaged: index digest")
        one.write_bytes(saved)
    shutil.copytree(b / "shards", a / "shards", dirs_exist_ok=True)
    ledger = a / "ledger" / "w.jsonl"
    mine, theirs = lines(a), lines(b)
    ledger.write_bytes(b"".join([mine[0], theirs[1], *mine[2:]]))
    refused(a, r"w\.jsonl line 2 is damaged: it belongs to another cache")
    ledger.write_bytes(b"".join(theirs))
    refused(a, r"w\.jsonl line 1 is damaged: it belongs to another cache")


def test_shards_swapped_within_a_cache(tmp_path):
    folder = write(tmp_path / "a")
    one, two, *_ = sorted((folder / "shards").iterdir())
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    refused(folder, "w-000000-.* is damaged")


# ------------------------------------------------------------ rows


@pytest.mark.parametrize(
    "order", [[1, 0, 2, 3], [0, 2, 1, 3], [0, 1, 1, 2, 3], [0, 1, 2, 3, 3], [0, 2, 3], [0, 1, 2, 3, 0]]
)
def test_rows_reordered_repeated_or_left_out(tmp_path, order):
    folder = write(tmp_path / "a")
    rows = lines(folder)
    (folder / "ledger" / "w.jsonl").write_bytes(b"".join(rows[i] for i in order))
    place = next(i for i, row in enumerate(order) if i != row)
    refused(folder, rf"w\.jsonl line {place + 1} is damaged: it is row {order[place]} of w, expected {place}")
    with pytest.raises(CacheError, match=rf"w\.jsonl line {place + 1} is damaged"):
        CacheWriter(folder, header(), writer="w")


@pytest.mark.parametrize("tail", [b"x\n", b"{}\n", b"\n", b"\0" * 40 + b"\n", b'{"kind": "shard"}\n'])
def test_a_last_line_that_is_no_row(tmp_path, tail):
    folder = write(tmp_path / "a")
    with (folder / "ledger" / "w.jsonl").open("ab") as file:
        file.write(tail)
    refused(folder, r"w\.jsonl line 5 is damaged")


@pytest.mark.parametrize("tail", [b"x", b"{", b"\0" * 40])
def test_a_last_line_without_its_end_is_told(tmp_path, tail, caplog):
    folder = write(tmp_path / "a")
    with (folder / "ledger" / "w.jsonl").open("ab") as file:
        file.write(tail)
    reader = read(folder)
    assert reader.torn == ["w"] and reader.stats()["samples"] == 8
    assert f"w.jsonl line 5: {len(tail)} bytes of a row that is not complete" in caplog.text


def test_a_ledger_cut_anywhere(tmp_path):
    """A prefix of the rows, and word of what is left of the next; never anything else."""
    folder = write(tmp_path / "a", shards=2)
    ledger, whole = folder / "ledger" / "w.jsonl", b"".join(lines(folder))
    ends = [0, *np.cumsum([len(line) for line in lines(folder)]).tolist()]
    for size in range(0, len(whole), 7):
        ledger.write_bytes(whole[:size])
        reader = read(folder)
        rows = sum(end <= size for end in ends) - 1
        assert reader.stats()["shards"] == rows and reader.torn == ["w"] * (size not in ends)


def test_a_row_that_was_read_before_an_error_is_not_lost(tmp_path, monkeypatch):
    """The error passes, be it a damaged row that is mended or a network that comes back; then all rows are there."""
    folder = write(tmp_path / "a", shards=1)
    reader = CacheReader(folder)
    write(folder, shards=4)
    ledger, whole = folder / "ledger" / "w.jsonl", b"".join(lines(folder))
    ledger.write_bytes(whole[:-10] + b"?" + whole[-9:])
    for _ in range(2):
        with pytest.raises(CacheError, match=r"w\.jsonl line 4"):
            reader.refresh()
    ledger.write_bytes(whole)

    def away(self, folder):
        raise CacheError(f"{folder}: the network is away")

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "names", away)
        follower = LedgerReader(LocalStore(folder), "w", reader.header.identity)
        for _ in range(2):
            with pytest.raises(CacheError, match="away"):
                follower.poll()
    assert len(follower.poll()) == 4
    assert reader.refresh() == 3 and reader.covers(np.arange(8)).all()


@pytest.mark.parametrize("far", [False, True])
def test_a_pinned_view_grows_when_it_is_refreshed(tmp_path, far):
    """Also where the file was copied to an object store."""
    folder = write(tmp_path / "a")
    where = folder
    if far:
        files = fsspec.filesystem("memory")
        for path in folder.rglob("*"):
            if path.is_file() and path.suffix != ".lock":
                files.pipe_file(f"/{tmp_path.name}/{path.relative_to(folder)}", path.read_bytes())
        where = f"memory://{tmp_path.name}"
    reader = CacheReader(where, {"w": 2})
    assert reader.covers(np.arange(8)).tolist() == [True] * 4 + [False] * 4
    assert reader.refresh() == 2 and reader.covers(np.arange(8)).all() and reader.view == {"w": 4}


# ------------------------------------------------------------ what is no file, or cannot be read


@pytest.mark.parametrize("name", ["cache.json", "ranks", "ledger/w.jsonl", "shards/w-000001"])
@pytest.mark.parametrize("what", ["folder", "empty", "forbidden"])
def test_a_folder_nothing_or_no_permission_in_place_of_a_file(tmp_path, name, what, monkeypatch):
    folder = write(tmp_path / "a")
    (path,) = (p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix().startswith(name))
    match = path.name
    if what == "forbidden":
        for owner, function in ((os, "open"), (Path, "read_bytes")):
            real = getattr(owner, function)

            def guarded(at, *args, real=real, **kwargs):
                if str(at) == str(path):
                    raise PermissionError(errno.EACCES, "Permission denied")
                return real(at, *args, **kwargs)

            monkeypatch.setattr(owner, function, guarded)
        match = rf"{path.name}: Permission denied"
    else:
        path.unlink()
        path.mkdir() if what == "folder" else path.touch()
    if (name, what) == ("ledger/w.jsonl", "empty"):
        assert read(folder).stats()["samples"] == 0  # what a writer that has just begun leaves
    else:
        refused(folder, match)


def test_a_full_disk_does_not_keep_a_lock_from_being_held(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with CacheWriter(tmp_path / "a", header(), writer="w") as writer:
        put(writer, [1])
    assert read(tmp_path / "a").covers(ALL).sum() == 1


# ------------------------------------------------------------ two with one name, clocks, compaction


def test_two_writers_with_one_name_on_an_object_store():
    """Nothing can lock there: who comes second with a row hears of it, and the first loses nothing."""
    url = "memory://two-writers"
    first = CacheWriter(url, header(), writer="w", shard_samples=2)
    second = CacheWriter(url, header(), writer="w", shard_samples=2)
    put(first, [0, 1])
    first.flush()
    put(second, [2, 3])
    with pytest.raises(CacheError, match=r"w/000000000\.json: another live process has the writer's name 'w'"):
        second.flush()
    second.close()
    put(first, [4, 5])
    first.close()
    reader = read(url)
    assert np.flatnonzero(reader.covers(ALL)).tolist() == [0, 1, 4, 5]
    with CacheWriter(url, header(), writer="w", shard_samples=2) as writer:
        put(writer, [0, 1])
        put(writer, [2, 3])
    assert reader.refresh() == 1 and reader.covers(np.arange(6)).all()


def test_equal_work_of_two_with_one_name_points_at_whole_bytes():
    """The same shard and row twice are one of each, as where an answer was lost; unequal work is refused."""
    url = "memory://equal-work"
    first, second = (CacheWriter(url, header(), writer="w", shard_samples=2) for _ in range(2))
    second._done = Newest(SAMPLES)  # it looked before the first had published
    put(first, [0, 1])
    first.flush()
    put(second, [0, 1])
    second.flush()
    put(first, [2, 3])
    first.flush()
    put(second, [4, 5])
    with pytest.raises(CacheError, match="another live process"):
        second.flush()
    first.close()
    second.close()
    reader = read(url)
    assert reader.covers(ALL).sum() == 4 and reader.view == {"w": 2}


def test_a_clock_that_runs_backwards_changes_nothing(tmp_path, monkeypatch):
    write(tmp_path / "a")
    now = [2e9]

    def backwards(*_):
        now[0] -= 1e6
        return now[0]

    for name in ("time", "monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, backwards)
    for name in ("time_ns", "monotonic_ns", "perf_counter_ns"):
        monkeypatch.setattr(time, name, lambda: int(backwards()))
    write(tmp_path / "b")
    read(tmp_path / "b")
    files = [
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file() and p.suffix != ".lock"}
        for f in (tmp_path / "a", tmp_path / "b")
    ]
    assert files[0] == files[1] and len(files[0]) == 8


def test_a_reader_while_shards_are_replaced(tmp_path):
    """Records move to other shards, rows are retired, files go: every state in between is whole."""
    folder = write(tmp_path / "a")
    before, after = CacheReader(folder), CacheReader(folder)
    truth = before.read(ALL, digests(ALL))

    def same(reader):
        got = reader.read(ALL, digests(ALL))
        assert all(x.equal(y) for x, y in zip(got.targets, truth.targets)) and got.step_B.equal(truth.step_B)

    with CacheWriter(folder, header(), writer="z", shard_samples=4, source="backfill") as writer:
        writer._done = Newest(SAMPLES)  # knows of nothing: a compaction writes what is there already
        for first in (0, 4):
            put(writer, list(range(first, first + 4)))
            writer.flush()
            assert after.refresh() == 1
            same(after)
        writer._ledger.retire([Retired("w", 0, 1), Retired("w", 2, 3)])
        same(after)  # not refreshed: the old shards
        after.refresh()
        same(after)
        assert {row.writer for row in after.rows} == {"z"}
    for path in (folder / "shards").glob("w-*"):
        path.unlink()
    same(after)
    same(CacheReader(folder))
    with pytest.raises(CacheError, match=r"w-00000\d-.*: No such file"):
        CacheReader(folder, before.view).read(ALL, digests(ALL))
    assert before.refresh() >= 1
    same(before)


def test_two_who_create_one_cache_do_not_harm_each_other(tmp_path, monkeypatch):
    """The second begins while the first has written the table of ranks beside its place, and not renamed it yet."""
    real, second = os.replace, []

    def rename(source, target, *args, **kwargs):
        if "ranks" in str(target) and not second:
            second.append(None)
            thread = Thread(target=lambda: second.append(write(tmp_path / "a", shards=1)))
            thread.start()
            time.sleep(0.3)
            real(source, target, *args, **kwargs)
            second.append(thread)
            return
        real(source, target, *args, **kwargs)

    monkeypatch.setattr(os, "replace", rename)
    with CacheWriter(tmp_path / "a", header(), writer="first") as writer:
        put(writer, [30])
    (thread,) = (each for each in second if hasattr(each, "join"))
    thread.join(PATIENCE)
    assert not checker.scan(tmp_path / "a").problems
    assert read(tmp_path / "a").covers(ALL).sum() == 3
