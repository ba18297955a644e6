"""Files swapped, cut, or of the wrong kind; clocks, names and readers that do not behave."""

import errno
import os
import shutil
import tempfile
import time
from pathlib import Path
from threading import Thread

import fsspec
import numpy as np
import pytest

from distill.cache import CacheReader, CacheWriter
from distill.cache.format import shard_name
from distill.cache.open_store import open_store
from distill.cache.view import open_view
from distill.config.errors import CacheError
from distill.tools.commands import main
from distill.tools.compact import compact
from distill.tools.repair import repair
from distill.tools.verify import verify
from tests.cli import PATIENCE
from tests.crash import _checker as checker
from tests.workers.cache_writers import SAMPLES, V, digests, header, put

ALL = np.arange(SAMPLES)


def write(folder, shards=4, corpus="corp", counts_V=None):
    with CacheWriter(folder, header(corpus=corpus), writer="w", shard_samples=2, counts_V=counts_V) as writer:
        for first in range(0, 2 * shards, 2):
            put(writer, [first, first + 1])
    return folder


def read(folder, ids=ALL):
    reader = CacheReader(folder)
    ids = ids[reader.covers(ids)]
    reader.read(ids, digests(ids))
    return reader


def refused(folder, match):
    with pytest.raises(CacheError, match=match):
        read(folder)


# ------------------------------------------------------------ swapped


def place(folder, seq):
    """Number 0 is a begin mark."""
    return folder / shard_name("w", seq)


@pytest.mark.parametrize("has_catalog", [True, False])
def test_shards_swapped_between_caches(tmp_path, has_catalog):
    """Of equal shape, of equal name: one file, then all."""
    a, b = write(tmp_path / "a"), write(tmp_path / "b", corpus="other")
    if not has_catalog:
        shutil.rmtree(a / "catalog")
    for seq in range(1, 5):
        one, two = place(a, seq), place(b, seq)
        saved, size = one.read_bytes(), one.stat().st_size
        one.write_bytes(two.read_bytes())
        assert one.stat().st_size == size
        if has_catalog:
            read(a)  # records of equal ids, tokens and bytes; their checks bind them
        else:
            refused(a, rf"{one.name} is damaged: it belongs to another cache")
        one.write_bytes(saved)
    shutil.copytree(b / "shards", a / "shards", dirs_exist_ok=True)
    if not has_catalog:
        refused(a, "it belongs to another cache, .*; this one is ")
    shutil.copytree(b / "catalog", a / "catalog", dirs_exist_ok=True)
    refused(a, "it belongs to another cache, .*; this one is |it is snapshot 0 of cache")


def test_shards_swapped_within_a_cache(tmp_path):
    folder = write(tmp_path / "a")
    one, two = place(folder, 1), place(folder, 2)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    refused(folder, r"00000000\d\.safetensors is damaged: sample \d does not verify")
    shutil.rmtree(folder / "catalog")
    refused(folder, "000000001.* is damaged: it is shard 2 of writer w, expected shard 1 of writer w")


def test_files_that_are_not_part_of_a_cache_are_in_nobodys_way(tmp_path):
    """Beside shards, in the catalog, beside streams; writers and readers go on."""
    folder = write(tmp_path / "a")
    for place in ("shards", "shards/w", "shards/w/000000", "catalog", "locks"):
        (folder / place / "lost+found").mkdir()
        (folder / place / ".ipynb_checkpoints").mkdir()
        (folder / place / "no-suffix").write_bytes(b"x")
        (folder / place / "000000001.safetensors (copy)").write_bytes(b"x")
        os.mkfifo(folder / place / "fifo")
    assert read(folder).covers(np.arange(8)).all()
    write(folder, shards=6)
    assert read(folder).covers(np.arange(12)).all()
    shutil.rmtree(folder / "catalog")
    assert read(folder).covers(np.arange(12)).all()
    assert verify(open_store(folder)).problems == []


@pytest.mark.parametrize("far", [False, True])
def test_a_pinned_view_grows_when_it_is_refreshed(tmp_path, far):
    """Also where the files were copied to an object store."""
    folder = write(tmp_path / "a")
    where = folder
    if far:
        files = fsspec.filesystem("memory")
        for path in folder.rglob("*"):
            if path.is_file() and path.suffix != ".lock":
                files.pipe_file(f"/{tmp_path.name}/{path.relative_to(folder)}", path.read_bytes())
        where = f"memory://{tmp_path.name}"
    reader = CacheReader(where, {"snapshot": -1, "streams": {"w": 3}})
    assert reader.covers(np.arange(8)).tolist() == [True] * 4 + [False] * 4
    assert reader.refresh() == 2 and reader.covers(np.arange(8)).all() and reader.view["streams"] == {"w": 5}


# ------------------------------------------------------------ what is no file, or cannot be read


@pytest.mark.parametrize("name", ["cache.json", "ranks", "shards/w/000000/000000002"])
@pytest.mark.parametrize("what", ["folder", "empty", "forbidden"])
def test_a_folder_nothing_or_no_permission_in_place_of_a_file(tmp_path, name, what, monkeypatch):
    folder = write(tmp_path / "a", counts_V=np.arange(V))
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
    refused(folder, match)


def test_a_full_disk_does_not_keep_a_lock_from_being_held(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with CacheWriter(tmp_path / "a", header(), writer="w") as writer:
        put(writer, [1])
    assert read(tmp_path / "a").covers(ALL).sum() == 1


def test_a_read_only_file_system(tmp_path, monkeypatch, capsys):
    """Readers and tools that only look need no lock and no temporary file."""
    folder = write(tmp_path / "a")
    damaged = write(tmp_path / "b")
    place(damaged, 2).write_bytes(place(damaged, 2).read_bytes()[:-1])
    real = os.open

    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def guarded(path, flags, *args, **kwargs):
        return (read_only if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else real)(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", guarded)
    for name in ("mkdir", "replace", "rename", "link", "unlink", "ftruncate", "truncate"):
        monkeypatch.setattr(os, name, read_only)
    assert read(folder).refresh() == 0
    assert main(["verify", str(folder)]) == 0 and main(["verify", "--decode", str(damaged)]) == 1
    assert main(["repair", "--dry-run", str(folder)]) == 0 and main(["repair", "--dry-run", str(damaged)]) == 1
    assert "lost: newest records of 1 samples: 3" in capsys.readouterr().out
    assert main(["repair", str(damaged)]) == 2
    assert "Read-only file system" in capsys.readouterr().err


def test_nothing_is_written_to_the_temporary_folder(tmp_path, monkeypatch):
    """However small it is: here there is none."""
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    folder = write(tmp_path / "a")
    read(folder)
    compact(open_store(folder), shard_bytes=2000)
    place(folder, 1).write_bytes(b"")
    repair(open_store(folder))
    assert verify(open_store(folder), decode=True).problems == []
    assert read(folder).covers(np.arange(8)).all()


@pytest.mark.parametrize("room", [0, 500, 2000, 4000, 6000, 8000, 40_000])
def test_a_repair_on_a_disk_that_is_full(tmp_path, monkeypatch, room):
    """Nothing changes before the report is written, and what is left undone is finished when there is room."""
    folder = write(tmp_path / "a")
    place(folder, 2).write_bytes(place(folder, 2).read_bytes()[:-1])
    place(folder, 3).write_bytes(place(folder, 3).read_bytes() + bytes(100))
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"}
    real, left = os.write, [room]

    def limited(fd, data):
        take = min(len(data), left[0])
        if not take:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= take
        return real(fd, data[:take])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", limited)
        try:
            repair(open_store(folder))
            is_done = True
        except CacheError as error:
            is_done = False
            assert "No space left" in str(error)
            if not list(folder.glob("quarantine/*.unfinished")):
                assert {p: p.read_bytes() for p in before} == before
    assert is_done >= (room == 40_000) and not list(folder.rglob("*.tmp"))
    done = repair(open_store(folder))
    assert done.lost == ([] if is_done else [3])
    assert verify(open_store(folder), decode=True)[:2] == ([], [])
    assert np.flatnonzero(read(folder).covers(ALL)).tolist() == [0, 1, 2, 4, 5, 6, 7]


# ------------------------------------------------------------ two with one name, clocks, compaction


def test_two_writers_with_one_name_on_an_object_store():
    """Nothing can lock there: the second to publish a number gets an error, and the first loses nothing."""
    url = "memory://two-writers"
    first = CacheWriter(url, header(), writer="w", shard_samples=2)
    second = CacheWriter(url, header(), writer="w", shard_samples=2)
    put(first, [0, 1])
    first.flush()
    put(second, [2, 3])
    with pytest.raises(CacheError, match=r"000000001\.safetensors: another live process has the writer's name 'w'"):
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


def test_equal_work_of_two_with_one_name_is_one_shard():
    """As where an answer was lost and the put was sent again; unequal work is refused."""
    url = "memory://equal-work"
    first, second = (CacheWriter(url, header(), writer="w", shard_samples=2) for _ in range(2))
    second._done = open_view(open_store(url), second.header)  # before the first has published
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
    assert reader.covers(ALL).sum() == 4 and reader.view["streams"] == {"w": 3}


def test_a_clock_that_runs_backwards_changes_nothing(tmp_path, monkeypatch):
    """But for the time in a snapshot."""
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
    folders = (tmp_path / "a", tmp_path / "b")
    files = [{p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.safetensors")} for folder in folders]
    assert files[0] == files[1] and len(files[0]) == 5
    one, two = (next(folder.glob("catalog/*.listing")).read_bytes() for folder in folders)
    assert one == two


def test_a_reader_while_shards_are_replaced(tmp_path):
    """Records move to other shards, files go: every state in between is whole."""
    folder = write(tmp_path / "a")
    before, after = CacheReader(folder), CacheReader(folder)
    truth = before.read(ALL, digests(ALL))

    def same(reader):
        got = reader.read(ALL, digests(ALL))
        assert all(x.equal(y) for x, y in zip(got.targets, truth.targets)) and got.step_B.equal(truth.step_B)

    compact(open_store(folder), shard_bytes=10**6)
    same(after)  # not refreshed: the old shards
    assert after.refresh() == 1
    same(after)
    same(CacheReader(folder, before.view))
    assert not CacheReader(folder, before.view).view["streams"].get("compact")
    for seq in range(1, 5):
        place(folder, seq).unlink()
    same(after)
    same(CacheReader(folder))
    with pytest.raises(CacheError, match=r"00000000\d\.safetensors: (No such file|the shard is missing)"):
        CacheReader(folder, before.view).read(ALL, digests(ALL))
    assert before.refresh() >= 1
    same(before)


def test_two_who_create_one_cache_do_not_harm_each_other(tmp_path, monkeypatch):
    """The second begins while the first has written the table of ranks beside its place, and not linked it yet."""
    real, second = os.link, []

    def link(source, target, *args, **kwargs):
        if "ranks" in str(target) and not second:
            second.append(None)
            thread = Thread(target=lambda: second.append(write(tmp_path / "a", shards=1, counts_V=np.arange(V))))
            thread.start()
            time.sleep(0.3)
            second.append(thread)
        real(source, target, *args, **kwargs)

    monkeypatch.setattr(os, "link", link)
    with CacheWriter(tmp_path / "a", header(), writer="first", counts_V=np.arange(V)) as writer:
        put(writer, [30])
    (thread,) = (each for each in second if hasattr(each, "join"))
    thread.join(PATIENCE)
    assert not checker.scan(tmp_path / "a").problems
    assert read(tmp_path / "a").covers(ALL).sum() == 3
