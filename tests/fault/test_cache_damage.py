"""Whatever happens to the files of a cache is found before anything of it is used."""

import logging
import random
import shutil

import numpy as np
import pytest

from distill.cache import CacheReader, CacheWriter
from distill.cache.format import HEADER
from distill.config.errors import CacheError
from distill.config.schema import CodecConfig
from tests.workers.cache_writers import SAMPLES, V, digests, header, put

IDS = [0, 3, 5, 9, 17, 39]


def shard(folder, number):
    (path,) = (folder / "shards").glob(f"w-{number:06d}-*.safetensors")
    return path


@pytest.fixture(scope="module", params=["systematic", "topk"])
def cache(request, tmp_path_factory):
    """Two shards and a closing row."""
    folder = tmp_path_factory.mktemp(request.param)
    codec = CodecConfig(request.param)
    with CacheWriter(folder, header(codec), writer="w", counts_V=np.arange(V) % 7, shard_samples=4) as writer:
        for ids in (IDS[:2], IDS[2:4], IDS[4:]):
            put(writer, ids, codec)
        writer.finish()
    return folder


def read_all(folder):
    reader = CacheReader(folder)
    assert reader.covers(np.arange(SAMPLES)).sum() == len(IDS)
    for sample in IDS:
        assert reader.read(np.array([sample]), digests([sample])).targets.covered_T.any()


@pytest.mark.parametrize("name", [HEADER, "ranks-*.safetensors", "ledger/w.jsonl", "shards/w-000000-*.safetensors"])
def test_every_flipped_bit_is_found(cache, tmp_path, name):
    """At random places, and at both ends of the file."""
    folder = tmp_path / "copy"
    shutil.copytree(cache, folder)
    read_all(folder)
    (path,) = folder.glob(name)
    data = path.read_bytes()
    rng = random.Random(name)
    places = [0, 1, 7, 8, len(data) - 2, len(data) - 1] + [rng.randrange(len(data)) for _ in range(150)]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CacheError, match=path.name.replace(".", r"\.")):
            read_all(folder)


def test_a_damaged_sample_is_named_and_the_others_are_still_good(cache, tmp_path):
    shutil.copytree(cache, tmp_path / "copy")
    path = shard(tmp_path / "copy", 1)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    reader = CacheReader(tmp_path / "copy")
    reader.read(np.array(IDS[:5]), digests(IDS[:5]))
    with pytest.raises(CacheError, match=r"w-000001-.*\.safetensors.*sample 39"):
        reader.read(np.array(IDS), digests(IDS))


@pytest.mark.parametrize("left", [0.0, 0.3, 0.9, -1])
def test_a_truncated_shard(cache, tmp_path, left):
    shutil.copytree(cache, tmp_path / "copy")
    path = shard(tmp_path / "copy", 0)
    data = path.read_bytes()
    path.write_bytes(data[: int(left * len(data)) if left >= 0 else -1])
    with pytest.raises(
        CacheError, match=rf"w-000000-.*\.safetensors \(samples 0 to 9\).*bytes, {len(data)} in the ledger"
    ):
        CacheReader(tmp_path / "copy")


def test_a_missing_shard(cache, tmp_path):
    shutil.copytree(cache, tmp_path / "copy")
    shard(tmp_path / "copy", 1).unlink()
    with pytest.raises(CacheError, match=r"w-000001-.*\.safetensors: No such file"):
        CacheReader(tmp_path / "copy")


def test_rows_lost_or_moved(cache, tmp_path):
    shutil.copytree(cache, tmp_path / "copy")
    ledger = tmp_path / "copy" / "ledger" / "w.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(lines[1:]))
    with pytest.raises(CacheError, match=r"w\.jsonl line 1 is damaged: it is row 1 of w, expected 0"):
        CacheReader(tmp_path / "copy")
    ledger.write_bytes(b"".join(lines))
    reader = CacheReader(tmp_path / "copy")
    ledger.write_bytes(lines[0])
    with pytest.raises(CacheError, match=r"w\.jsonl is damaged: \d+ bytes, \d+ have been read before"):
        reader.refresh()
    ledger.rename(ledger.with_name("v.jsonl"))
    with pytest.raises(CacheError, match=r"v\.jsonl line 1 is damaged: it is row 0 of w"):
        CacheReader(tmp_path / "copy")


def test_a_failed_refresh_keeps_failing_and_keeps_the_view(tmp_path):
    with CacheWriter(tmp_path, header(), writer="w") as writer:
        put(writer, [1])
        writer.flush()
        reader = CacheReader(tmp_path)
        put(writer, [2])
    path = shard(tmp_path, 1)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    for _ in range(2):
        with pytest.raises(CacheError, match="w-000001"):
            reader.refresh()
    assert reader.read(np.array([1, 2]), digests([1, 2])).step_B.tolist() == [0, -1]
    path.write_bytes(data)
    assert reader.refresh() == 1 and reader.covers(np.array([2])).all()


@pytest.mark.parametrize("part", [1, 40, -1])
def test_a_torn_last_row_is_as_if_it_had_not_been_begun(tmp_path, caplog, part):
    """Readers report it; so does the writer, who removes it and its shard and goes on."""
    with CacheWriter(tmp_path, header(), writer="w") as writer:
        put(writer, [1])
        writer.flush()
        put(writer, [2])
    ledger = tmp_path / "ledger" / "w.jsonl"
    first, second = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(first + second[:part])
    with caplog.at_level(logging.WARNING):
        reader = CacheReader(tmp_path)
        assert reader.covers(np.array([1, 2])).tolist() == [True, False] and reader.torn == ["w"]
        with CacheWriter(tmp_path, header(), writer="w") as writer:
            assert ledger.read_bytes() == first
            assert [p.name[:8] for p in (tmp_path / "shards").iterdir()] == ["w-000000"]
            put(writer, [3])
        CacheWriter(tmp_path, header(), writer="w").close()
    assert len(caplog.records) >= 2 and all("w.jsonl" in r.getMessage() for r in caplog.records)
    assert "removed a torn last row" in caplog.text
    assert reader.refresh() == 1 and reader.covers(np.array([1, 2, 3])).tolist() == [True, False, True]


def test_a_writer_refuses_a_damaged_ledger(tmp_path):
    with CacheWriter(tmp_path, header(), writer="w") as writer:
        put(writer, [1])
    ledger = tmp_path / "ledger" / "w.jsonl"
    data = bytearray(ledger.read_bytes())
    data[20] ^= 4
    ledger.write_bytes(data)
    with pytest.raises(CacheError, match=r"w\.jsonl line 1 is damaged"):
        CacheWriter(tmp_path, header(), writer="w")
    CacheWriter(tmp_path, header(), writer="w2").close()


def test_a_writer_does_not_go_on_after_a_ledger_that_was_cut_between_rows(tmp_path):
    """A kill leaves one shard without a row; two or more mean that rows are gone, and their shards must not go too."""
    with CacheWriter(tmp_path, header(), writer="w", shard_samples=1) as writer:
        for i in range(3):
            put(writer, [i])
    ledger = tmp_path / "ledger" / "w.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(lines[0])
    with pytest.raises(CacheError, match=r"w-000002-.*: shard 2 is there, but ledger w has 1 rows: it was cut"):
        CacheWriter(tmp_path, header(), writer="w")
    assert len(list((tmp_path / "shards").iterdir())) == 3
    ledger.write_bytes(b"".join(lines[:2]))
    CacheWriter(tmp_path, header(), writer="w").close()
    assert len(list((tmp_path / "shards").iterdir())) == 2
