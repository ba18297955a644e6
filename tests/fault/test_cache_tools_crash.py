"""Tools that are stopped at any step: nothing that was readable is lost, and the next one finishes the work."""

import errno
import itertools
import os
import shutil

import numpy as np
import pytest

from distill.cache import CacheReader, CacheWriter
from distill.cache.format import shard_name
from distill.cache.open_store import open_store
from distill.cache.snapshot import newest_snapshot
from distill.config.errors import CacheError
from distill.tools.compact import compact
from distill.tools.merge import merge
from distill.tools.repair import repair
from distill.tools.verify import verify
from tests import format_reader, shards
from tests.workers.cache_writers import SAMPLES, digests, header, put


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Nine shards by two writers; samples 3, 4 and 12 twice."""
    folder = tmp_path_factory.mktemp("whole")
    for name, step, parts in (("a", 0, ([3, 1], [4, 12], [7], [9])), ("b", 5, ([3], [4, 2], [12], [20], [21, 22]))):
        with CacheWriter(folder, header(), writer=name, shard_samples=99) as writer:
            for n, ids in enumerate(parts):
                put(writer, ids, step=step + n)
                writer.flush()
            writer.finish()
    return folder


def stopped(monkeypatch, step, allowed, call, *args, **options) -> bool:
    """Whether `call` was stopped: its os.`step` number `allowed` fails, or what follows it is not reached."""
    real, left = getattr(os, step), [allowed]

    def limited(*arguments, **named):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, "stopped here")
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, step, limited)
        try:
            call(*args, **options)
        except (CacheError, OSError) as error:
            assert "stopped here" in str(error)
            return True
    return False


def reads_the_same(folder, before):
    reader = CacheReader(folder)
    assert format_reader.cache(folder) == before
    ids = np.array(sorted(before))
    assert np.flatnonzero(reader.covers(np.arange(SAMPLES))).tolist() == ids.tolist() and reader.finished
    assert reader.frontier is None
    assert reader.read(ids, digests(ids)).step_B.tolist() == [before[i][0] for i in ids.tolist()]


def leftovers(folder):
    """Files that nothing names."""
    return [path for path in folder.rglob("*.tmp*")]


STEPS = ["fsync", "replace", "link", "unlink"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("size", [1000, 10**6])
def test_a_compaction(whole, tmp_path, monkeypatch, step, size):
    before, losses = format_reader.cache(whole), CacheReader(whole).losses
    for allowed in itertools.count():
        folder = tmp_path / str(allowed)
        shutil.copytree(whole, folder)
        if not stopped(monkeypatch, step, allowed, compact, open_store(folder), shard_bytes=size, purge_age=0):
            break
        reads_the_same(folder, before)
        assert verify(open_store(folder)).problems == []
        with CacheWriter(folder, header(), writer="a") as writer:  # whoever resumes meanwhile
            put(writer, [3], step=5)
            writer.finish()
        reads_the_same(folder, before)
        compact(open_store(folder), shard_bytes=size, purge_age=0)
        reads_the_same(folder, before)
        assert verify(open_store(folder), decode=True).problems == [] and CacheReader(folder).losses == losses
        there = shards.headers(folder)
        assert sum(shard.samples for shard in there) == len(before) == sum(shard.tokens for shard in there) // 15
        for path in (folder / "catalog").iterdir():  # what no snapshot names is removed when it is a day old
            os.utime(path, (1, 1))
        compact(open_store(folder), shard_bytes=size, purge_age=0)
        named = {ref.name for ref in newest_snapshot(open_store(folder), there[0].cache).listings}
        assert {f"catalog/{path.name}" for path in (folder / "catalog").glob("*.listing")} == named
    assert allowed >= 1


@pytest.mark.parametrize("step", STEPS[:3])
def test_a_merge(whole, tmp_path, monkeypatch, step):
    before, losses = format_reader.cache(whole), CacheReader(whole).losses
    for allowed in itertools.count():
        folder = tmp_path / str(allowed)
        if not stopped(monkeypatch, step, allowed, merge, [open_store(whole)], open_store(folder), shard_bytes=900):
            break
        there = format_reader.cache(folder) if (folder / "cache.json").exists() else {}
        assert there.items() <= before.items()
        assert merge([open_store(whole)], open_store(folder), shard_bytes=900).copied == len(before) - len(there)
        assert format_reader.cache(folder) == before
        assert verify(open_store(folder), decode=True).problems == []
        assert sum(shard.samples for shard in shards.headers(folder)) == len(before)
    assert allowed >= 1 and CacheReader(folder).losses == losses


@pytest.mark.parametrize("tool", ["compact", "merge"])
def test_a_full_disk(whole, tmp_path, monkeypatch, tool):
    """After any number of bytes: what was there is read as before, nothing is left half-done, and a retry finishes."""
    before, real = format_reader.cache(whole), os.write

    def run(folder):
        if tool == "compact":
            compact(open_store(folder), shard_bytes=1000, purge_age=0)
        else:
            merge([open_store(whole)], open_store(folder), shard_bytes=900)

    for size in itertools.count(0, 700):
        folder, left = tmp_path / str(size), [size]
        if tool == "compact":
            shutil.copytree(whole, folder)

        def write(fd, data):
            part = bytes(data[: left[0]])  # noqa: B023 (called within the iteration)
            left[0] -= len(part)  # noqa: B023
            if not part and len(data):
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(fd, part)

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write)
            try:
                run(folder)
            except CacheError as error:
                assert "No space left on device" in str(error) and str(folder) in str(error)
            else:
                break
        assert leftovers(folder) == []
        if tool == "compact":
            reads_the_same(folder, before)
        run(folder)
        assert format_reader.cache(folder) == before and leftovers(folder) == []
    assert size >= 3000


@pytest.mark.parametrize("step", STEPS)
def test_a_repair(whole, tmp_path, monkeypatch, step):
    damaged = tmp_path / "damaged"
    shutil.copytree(whole, damaged)
    names = [damaged / shard_name("a", 2), damaged / shard_name("b", 2)]
    for path, end in zip(names, (-1, None)):  # the record of 12 at step 1, which b has later; the shard of 4 and 2
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 4]) if end else data[:40])
    (damaged / "shards" / "a" / "000000" / "notes.safetensors").write_bytes(b"x")
    lost = {2, 4}
    want = {s: record for s, record in format_reader.cache(whole).items() if s not in lost}
    for allowed in itertools.count():
        folder = tmp_path / str(allowed)
        shutil.copytree(damaged, folder)
        is_stopped = stopped(monkeypatch, step, allowed, repair, open_store(folder))
        repair(open_store(folder))
        assert verify(open_store(folder), decode=True).problems == []
        found = format_reader.cache(folder)
        assert {s: record for s, record in found.items() if s not in lost} == want
        assert 2 not in found and found[4][0] == 1  # of 4 the older record is left
        assert CacheReader(folder).finished
        if not is_stopped:
            break
    assert allowed >= 2
