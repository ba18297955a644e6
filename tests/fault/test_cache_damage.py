"""Whatever happens to the files of a cache is found before anything of it is used."""

import random
import shutil

import numpy as np
import pytest

from distill.cache import CacheReader, CacheWriter
from distill.cache.format import HEADER, shard_name
from distill.config.errors import CacheError
from distill.config.schema import CodecConfig
from tests.workers.cache_writers import SAMPLES, V, digests, header, put

IDS = [0, 3, 5, 9, 17, 39]


def shard(folder, number):
    """Number 0 is a begin mark."""
    return folder / shard_name("w", number)


@pytest.fixture(scope="module", params=["systematic", "topk"])
def cache(request, tmp_path_factory):
    """Two shards between marks."""
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


def flips(path):
    """The file's bytes with one bit flipped, at random places and at both ends; and as it was."""
    data, rng = path.read_bytes(), random.Random(path.name)
    places = [0, 1, 7, 8, len(data) - 2, len(data) - 1] + [rng.randrange(len(data)) for _ in range(150)]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        yield place
    path.write_bytes(data)


@pytest.mark.parametrize("name", [HEADER, "ranks-*.safetensors", shard_name("w", 0), shard_name("w", 1)])
def test_every_flipped_bit_is_found(cache, tmp_path, name):
    """Without a catalog: everything is read from the shards."""
    folder = tmp_path / "copy"
    shutil.copytree(cache, folder)
    shutil.rmtree(folder / "catalog")
    read_all(folder)
    (path,) = folder.glob(name)
    for _ in flips(path):
        with pytest.raises(CacheError, match=path.name.replace(".", r"\.")):
            read_all(folder)


@pytest.mark.parametrize("name", ["*.json", "*.listing"])
def test_a_damaged_catalog_is_named_and_the_shards_serve(cache, tmp_path, name, caplog):
    folder = tmp_path / "copy"
    shutil.copytree(cache, folder)
    (path,) = (folder / "catalog").glob(name)
    for place in flips(path):
        caplog.clear()
        read_all(folder)
        assert path.name in caplog.text and "shards" in caplog.text, place


def test_the_snapshot_before_a_damaged_one_serves(tmp_path, caplog):
    """With what was published after it."""
    with CacheWriter(tmp_path, header(), writer="w", shard_samples=2, index_every=2) as writer:
        for first in range(0, 12, 2):
            put(writer, [first, first + 1])
    snapshots = sorted((tmp_path / "catalog").glob("*.json"))
    assert len(snapshots) >= 3
    snapshots[-1].write_bytes(snapshots[-1].read_bytes()[:-1])
    reader = CacheReader(tmp_path)
    assert reader.covers(np.arange(12)).all() and snapshots[-1].name in caplog.text
    assert reader.view["snapshot"] == int(snapshots[-2].stem)


def test_a_damaged_sample_is_named_and_the_others_are_still_good(cache, tmp_path):
    shutil.copytree(cache, tmp_path / "copy")
    path = shard(tmp_path / "copy", 2)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    reader = CacheReader(tmp_path / "copy")
    reader.read(np.array(IDS[:5]), digests(IDS[:5]))
    with pytest.raises(CacheError, match=r"000000002\.safetensors.*sample 39"):
        reader.read(np.array(IDS), digests(IDS))


@pytest.mark.parametrize("left", [0.0, 0.3, 0.9, -1])
@pytest.mark.parametrize("has_catalog", [True, False])
def test_a_truncated_shard(cache, tmp_path, left, has_catalog):
    shutil.copytree(cache, tmp_path / "copy")
    path = shard(tmp_path / "copy", 1)
    data = path.read_bytes()
    path.write_bytes(data[: int(left * len(data)) if left >= 0 else -1])
    if not has_catalog:
        shutil.rmtree(tmp_path / "copy" / "catalog")
    with pytest.raises(CacheError, match=r"000000001\.safetensors.* is damaged"):
        read_all(tmp_path / "copy")


@pytest.mark.parametrize("has_catalog", [True, False])
def test_a_missing_shard(cache, tmp_path, has_catalog):
    shutil.copytree(cache, tmp_path / "copy")
    shard(tmp_path / "copy", 1).unlink()
    if not has_catalog:
        shutil.rmtree(tmp_path / "copy" / "catalog")
    with pytest.raises(CacheError, match=r"000000001\.safetensors: (No such file|the shard is missing)"):
        read_all(tmp_path / "copy")


def test_shards_moved_or_in_anothers_place(cache, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(cache, folder)
    shutil.rmtree(folder / "catalog")
    shard(folder, 2).rename(shard(folder, 1))
    with pytest.raises(CacheError, match=r"it is shard 2 of writer w, expected shard 1 of writer w"):
        CacheReader(folder)
    (folder / "shards" / "w").rename(folder / "shards" / "v")
    with pytest.raises(CacheError, match=r"it is shard 0 of writer w, expected shard 0 of writer v"):
        CacheReader(folder)


def test_a_failed_refresh_keeps_failing_and_keeps_the_view(tmp_path):
    with CacheWriter(tmp_path, header(), writer="w") as writer:
        put(writer, [1])
        writer.flush()
        reader = CacheReader(tmp_path)
        put(writer, [2])
        writer.flush()
        path = shard(tmp_path, 2)
        data = path.read_bytes()
        path.write_bytes(data[:-1])
        for _ in range(2):
            with pytest.raises(CacheError, match="000000002"):
                reader.refresh()
        assert reader.read(np.array([1, 2]), digests([1, 2])).step_B.tolist() == [0, -1]
        path.write_bytes(data)
        assert reader.refresh() == 1 and reader.covers(np.array([2])).all()


def test_a_writer_refuses_a_damaged_stream(tmp_path):
    with CacheWriter(tmp_path, header(), writer="w", shard_samples=1) as writer:
        for i in range(3):
            put(writer, [i])
    shutil.rmtree(tmp_path / "catalog")
    data = shard(tmp_path, 2).read_bytes()
    shard(tmp_path, 2).write_bytes(data[:50] + bytes([data[50] ^ 4]) + data[51:])
    with pytest.raises(CacheError, match=r"000000002\.safetensors is damaged"):
        CacheWriter(tmp_path, header(), writer="w")
    shard(tmp_path, 2).unlink()
    with pytest.raises(CacheError, match=r"000000002\.safetensors: the shard is missing"):
        CacheWriter(tmp_path, header(), writer="w")


def test_a_view_is_what_it_was_where_the_catalog_was_lost_and_made_again(tmp_path):
    """With the same number, and more shards."""
    with CacheWriter(tmp_path, header(), writer="w") as writer:
        put(writer, [1])
    view = CacheReader(tmp_path).view
    shutil.rmtree(tmp_path / "catalog")
    with CacheWriter(tmp_path, header(), writer="w") as writer:
        put(writer, [2])
    assert CacheReader(tmp_path).view["snapshot"] == view["snapshot"] == 0
    assert CacheReader(tmp_path, view).covers(np.array([1, 2])).tolist() == [True, False]
