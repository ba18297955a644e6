"""Tools that are stopped at any step: nothing that was readable is lost, and the next one finishes the work."""

import errno
import itertools
import os
import shutil

import numpy as np
import pytest

from distill.cache import CacheReader, CacheWriter
from distill.cache.open_store import open_store
from distill.config.errors import CacheError
from distill.tools.compact import compact
from distill.tools.merge import merge
from distill.tools.repair import repair
from distill.tools.verify import verify
from tests import format_reader
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
    assert reader.frontier(2) is None
    assert reader.read(ids, digests(ids)).step_B.tolist() == [before[i][0] for i in ids.tolist()]


@pytest.mark.parametrize("step", ["fsync", "replace", "unlink"])
@pytest.mark.parametrize("size", [1000, 10**6])
def test_a_compaction(whole, tmp_path, monkeypatch, step, size):
    before = format_reader.cache(whole)
    for allowed in itertools.count():
        folder = tmp_path / str(allowed)
        shutil.copytree(whole, folder)
        if not stopped(monkeypatch, step, allowed, compact, open_store(folder), shard_bytes=size, purge=True):
            break
        reads_the_same(folder, before)
        assert verify(open_store(folder)).problems == []
        with CacheWriter(folder, header(), writer="a") as writer:  # whoever resumes meanwhile
            put(writer, [3], step=5)
            writer.finish()
        reads_the_same(folder, before)
        compact(open_store(folder), shard_bytes=size, purge=True)
        reads_the_same(folder, before)
        assert verify(open_store(folder), decode=True)[:2] == ([], [])
        rows = CacheReader(folder).rows
        assert sum(row.samples for row in rows) == len(before) == sum(row.tokens for row in rows) // 15
    assert allowed >= 1


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_merge(whole, tmp_path, monkeypatch, step):
    before = format_reader.cache(whole)
    for allowed in itertools.count():
        folder = tmp_path / str(allowed)
        if not stopped(monkeypatch, step, allowed, merge, [open_store(whole)], open_store(folder), shard_bytes=900):
            break
        there = format_reader.cache(folder) if (folder / "cache.json").exists() else {}
        assert there.items() <= before.items()
        assert merge([open_store(whole)], open_store(folder), shard_bytes=900).copied == len(before) - len(there)
        assert format_reader.cache(folder) == before
        assert verify(open_store(folder), decode=True)[:2] == ([], [])
        assert sum(row.samples for row in CacheReader(folder).rows) == len(before)
    assert allowed >= 4


@pytest.mark.parametrize("step", ["fsync", "replace", "unlink"])
def test_a_repair(whole, tmp_path, monkeypatch, step):
    damaged = tmp_path / "damaged"
    shutil.copytree(whole, damaged)
    names = sorted((damaged / "shards").iterdir())
    for path, end in ((names[1], -1), (names[5], None)):  # the record of 12 at step 1, which b has later; a whole shard
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 4]) if end else data[:40])
    ledger = damaged / "ledger" / "b.jsonl"
    ledger.write_bytes(ledger.read_bytes().replace(b'"seq": 3', b'"seq": 7', 1) + b'{"kind": "sh')
    (damaged / "shards" / "a-000009-0123456789abcdef.safetensors").write_bytes(b"x")
    lost = {2, 4}
    want = {s: record for s, record in format_reader.cache(whole).items() if s not in lost}
    for allowed in itertools.count():
        folder = tmp_path / str(allowed)
        shutil.copytree(damaged, folder)
        is_stopped = stopped(monkeypatch, step, allowed, repair, open_store(folder))
        repair(open_store(folder))
        assert verify(open_store(folder), decode=True)[:2] == ([], [])
        found = format_reader.cache(folder)
        assert {s: record for s, record in found.items() if s not in lost} == want
        assert 2 not in found and found[4][0] == 1  # of 4 the older record is left
        assert CacheReader(folder).finished
        if not is_stopped:
            break
    assert allowed >= 2
