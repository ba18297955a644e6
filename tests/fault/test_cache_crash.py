"""Writers that are killed, starved of disk, shut out, or doubled."""

import errno
import multiprocessing
import os
import time

import numpy as np
import pytest
import torch

from distill.cache import CacheReader, CacheWriter, make_codec
from distill.config.errors import CacheError
from distill.config.schema import CodecConfig, OnFull
from tests.cli import PATIENCE
from tests.workers.cache_writers import SAMPLES, S, V, batch, digests, header, put, same_row, write_until_killed

FORK = multiprocessing.get_context("fork")


def published_is_whole(folder):
    """Every covered sample reads, and says what its teacher said."""
    reader = CacheReader(folder)
    ids = np.flatnonzero(reader.covers(np.arange(SAMPLES)))
    targets = reader.read(ids, digests(ids)).targets
    if len(ids):
        want = batch(ids)
        assert torch.equal(targets.covered_T, want.valid)
        ids_TK, probs_TK = make_codec(CodecConfig(), 64).decode(want.atoms)
        for t in range(0, len(ids) * S, 7):
            assert same_row(targets, t, ids_TK[t], probs_TK[t]) or not want.valid[t]
    return reader


@pytest.mark.parametrize("step", ["fsync", "link", "replace"])
def test_stopped_between_any_two_steps(tmp_path, monkeypatch, step):
    """The n-th fsync, link or replace never happens, for every n: what is seen is a prefix of what was published."""
    real = getattr(os, step)
    seen = []
    for allowed in range(40):
        folder = tmp_path / str(allowed)
        left = [allowed]

        def limited(*args, left=left, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.EIO, "stopped here")
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, step, limited)
            try:
                with CacheWriter(folder, header(), writer="w", shard_samples=1) as writer:
                    for i in range(3):
                        put(writer, [i])
            except CacheError as error:
                assert "stopped here" in str(error)
        with CacheWriter(folder, header(), writer="w") as writer:
            reader = published_is_whole(folder)
            put(writer, [30])
        seen.append(reader.stats()["samples"])
        assert not list(folder.rglob("*.tmp")) and reader.refresh() == 1
    assert seen == sorted(seen) and set(seen) == ({3} if step == "replace" else {0, 1, 2, 3})


@pytest.mark.parametrize("on_full", list(OnFull))
@pytest.mark.parametrize("room", [100, 2000, 4000, 6000, 8000])
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch, room, on_full):
    """Wherever it fills up: nothing hangs, nothing half-written is seen, and with room again work goes on."""
    write, left = os.write, [10**9]

    def limited(fd, data):
        take = min(len(data), left[0])
        if not take:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= take
        return write(fd, data[:take])

    monkeypatch.setattr(os, "write", limited)
    writer = CacheWriter(tmp_path, header(), writer="w", shard_samples=1, queue=1, on_full=on_full)
    left[0] = room
    with pytest.raises(CacheError, match=r"(safetensors|json|listing): No space left"):
        for i in range(10):
            while not put(writer, [i]):
                time.sleep(0.001)
        writer.flush()
    with pytest.raises(CacheError, match="No space left"):
        writer.flush()
    with pytest.raises(CacheError, match="No space left"):
        put(writer, [11])
    writer.close()
    left[0] = 10**9
    assert not list(tmp_path.rglob("*.tmp"))
    before = published_is_whole(tmp_path).stats()["samples"]
    assert before == writer.stats.samples
    with CacheWriter(tmp_path, header(), writer="w") as writer:
        put(writer, [SAMPLES - 1])
    assert published_is_whole(tmp_path).stats()["samples"] == before + 1


def test_close_raises_what_nobody_has_heard(tmp_path, monkeypatch):
    writer = CacheWriter(tmp_path, header(), writer="w")
    monkeypatch.setattr(
        os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EACCES, "Permission denied"))
    )
    put(writer, [1])
    with pytest.raises(CacheError, match=r"000000001\.safetensors: Permission denied"):
        writer.close()
    writer.close()


@pytest.mark.parametrize("what", ["cache.json", "ranks", "000000000.safetensors", "w.lock", ".lock"])
def test_no_permission_to_create(tmp_path, monkeypatch, what):
    real = os.open

    def guarded(path, flags, *args):
        if what in str(path) and flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags, *args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", guarded)
        with pytest.raises(CacheError, match=rf"{what}.*: Permission denied"):
            CacheWriter(tmp_path, header(), writer="w", counts_V=np.ones(V))
    with CacheWriter(tmp_path, header(), writer="w", counts_V=np.ones(V)) as writer:
        put(writer, [1])
    assert published_is_whole(tmp_path).stats()["samples"] == 1


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(CacheError, match=r"cache(/shards)?: (Not a directory|File exists)"):
        CacheWriter(tmp_path / "cache", header(), writer="w")


def test_one_name_one_live_writer(tmp_path):
    ready = FORK.Event()
    child = FORK.Process(target=write_until_killed, args=(tmp_path, ready, 0), daemon=True)
    child.start()
    assert ready.wait(PATIENCE)
    with pytest.raises(CacheError, match=rf"process \(pid {child.pid}\) holds the writer's name 'w'"):
        CacheWriter(tmp_path, header(), writer="w")
    CacheWriter(tmp_path, header(), writer="w2").close()
    child.kill()
    child.join()
    with CacheWriter(tmp_path, header(), writer="w"), pytest.raises(CacheError, match="holds the writer's name"):
        CacheWriter(tmp_path, header(), writer="w")
    CacheWriter(tmp_path, header(), writer="w").close()


def test_readers_follow_a_writer_in_another_process(tmp_path):
    CacheWriter(tmp_path, header(), writer="w").close()
    ready = FORK.Event()
    child = FORK.Process(target=write_until_killed, args=(tmp_path, ready, 0), daemon=True)
    reader = CacheReader(tmp_path)
    child.start()
    try:
        new, end = 0, time.monotonic() + PATIENCE
        while new < 15 and time.monotonic() < end:
            new += reader.refresh()
            ids = np.flatnonzero(reader.covers(np.arange(SAMPLES)))
            assert len(reader.read(ids, digests(ids)).targets.covered_T) == len(ids) * S
        assert new >= 15
    finally:
        child.kill()
        child.join()


def test_an_error_of_our_own_in_the_thread_is_not_swallowed(tmp_path, monkeypatch):
    monkeypatch.setattr("distill.cache.writer.publish_shard", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), CacheWriter(tmp_path, header(), writer="w") as writer:
        put(writer, [1])
        writer.flush()
