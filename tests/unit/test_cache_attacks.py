"""Faults that somebody found who attacked the cache from outside."""

import contextlib
import os
import shutil

import numpy as np
import pytest

from distill.cache import CacheReader, CacheWriter, cataloging
from distill.cache.loss_curve import LossSums
from distill.cache.open_store import open_store
from distill.config.errors import CacheError
from distill.tools import repair as repair_tool
from distill.tools.compact import compact
from distill.tools.merge import merge
from distill.tools.repair import repair
from distill.tools.verify import verify
from tests.workers.cache_writers import batch, digests, header, put

ALL = np.arange(12)


def write(folder, ids=ALL, step=0, writer="a", **options):
    with CacheWriter(folder, header(), writer=writer, shard_samples=3, **options) as cache:
        for i in ids:
            put(cache, [i], step=step)


@pytest.mark.parametrize("which", ["another name", "its folder", "one file"])
def test_links_to_shards_are_no_copies_of_them(tmp_path, which):
    write(tmp_path)
    shards = tmp_path / "shards"
    if which == "another name":
        (shards / "link").symlink_to("a")
    elif which == "its folder":
        (shards / "a").rename(shards / "moved")
        (shards / "a").symlink_to("moved")
    else:
        file = shards / "a" / "000000" / "000000002.safetensors"
        file.rename(file.with_name("bak.safetensors"))
        file.symlink_to("bak.safetensors")
    for _ in range(2):
        with contextlib.suppress(CacheError if which == "its folder" else ()):
            assert not repair(open_store(tmp_path)).lost
    assert len({file.resolve() for file in shards.rglob("*.safetensors")}) == 5
    if which == "its folder":
        return  # what lies in a folder of another writer's name is not read before it is renamed
    ids = [sample.sample_id for sample in CacheReader(tmp_path).samples()]
    assert sorted(ids) == ALL.tolist()
    assert not verify(open_store(tmp_path)).problems


def test_an_idle_reader_goes_on_after_a_purge(tmp_path):
    write(tmp_path, ALL[:6])
    reader = CacheReader(tmp_path)
    write(tmp_path, ALL[6:], step=1, writer="b")
    compact(open_store(tmp_path), shard_bytes=10**6, purge_age=0.0)
    reader.refresh()
    assert all(reader.records(ALL)) and CacheReader(tmp_path, reader.view).covers(ALL).all()


def test_a_view_without_a_snapshot_counts_nothing_twice(tmp_path):
    write(tmp_path)
    shutil.rmtree(tmp_path / "catalog")
    reader = CacheReader(tmp_path)
    before = reader.losses.json()
    compact(open_store(tmp_path), shard_bytes=10**6, purge_age=0.0)
    reader.refresh()
    assert reader.losses.json() == before and len(list(reader.samples())) == len(ALL)
    assert sum(origin.samples for origin in reader.summary) == len(ALL)


def tokens(folder) -> list[int]:
    return CacheReader(folder).losses.curve().tokens.tolist()


def test_loss_sums_of_a_merge_are_those_of_its_records(tmp_path):
    for step in range(4):
        write(tmp_path / "a", ALL[3 * step : 3 * step + 3], step=step, writer=f"w{step}")
        compact(open_store(tmp_path / "a"), shard_bytes=10**6)
        merge([open_store(tmp_path / "a")], open_store(tmp_path / "t"), shard_bytes=10**6)
        merge([open_store(tmp_path / "a")], open_store(tmp_path / "t"), shard_bytes=10**6)
    assert tokens(tmp_path / "t") == tokens(tmp_path / "a") == [45] * 4
    sums = [LossSums.total([CacheReader(tmp_path / name).losses]).curve().losses for name in "at"]
    np.testing.assert_allclose(*sums, rtol=0.02)


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_loss_sums_of_a_merge_do_not_depend_on_the_order(tmp_path, order):
    write(tmp_path / "a", ALL[:6])
    write(tmp_path / "b", ALL)
    merge([open_store(tmp_path / name) for name in order], open_store(tmp_path / "t"), shard_bytes=10**6)
    assert tokens(tmp_path / "t") == [15 * len(ALL)]


def test_what_is_published_is_not_published_again_by_whoever_begins_anew(tmp_path):
    with CacheWriter(tmp_path, header(), writer="a", shard_samples=3) as cache:
        for step in range(6):
            put(cache, [step], step=step)
        cache.finish()
    with CacheWriter(tmp_path, header(), writer="a", shard_samples=3, first_step=2, is_restart=True) as cache:
        for step in range(6):
            put(cache, [step], step=step)
        assert cache.stats.passed == 6
        with pytest.raises(CacheError, match="sample 1 has targets of step 1 by teacher t, and these are of teacher u"):
            put(cache, [1], step=1, teacher="u")
    assert tokens(tmp_path) == [15] * 6


def test_another_teacher_and_other_tokens_are_refused(tmp_path):
    with CacheWriter(tmp_path, header(), writer="a", shard_samples=1) as cache:
        put(cache, [3], step=4)
        cache.flush()
        with pytest.raises(CacheError, match="sample 3 has targets of step 4 by teacher t"):
            put(cache, [3], step=4, teacher="u")
        made = batch([3])._replace(digests=digests([3]) + np.uint64(1))
        with pytest.raises(CacheError, match=r"sample 3 has digest .* the tokens are not the same"):
            cache.put(*made, step=4, tokens_seen=0, teacher="u")


@pytest.mark.parametrize(
    "options", [{"source": "x"}, {"source": "compact"}, {"first_step": -5}, {"flops_per_token": float("inf")},
                {"flops_per_token": -1.0}, {"shard_samples": 0}, {"index_every": 0}],
)  # fmt: skip
def test_a_writer_with_nonsense_leaves_nothing(tmp_path, options):
    with pytest.raises(CacheError, match="allowed are capture, backfill, import"):
        CacheWriter(tmp_path, header(), writer="a", **options)
    assert not os.listdir(tmp_path)


def test_a_repair_that_is_killed_before_it_prints_is_reported_by_the_next(tmp_path):
    write(tmp_path)
    file = tmp_path / "shards" / "a" / "000000" / "000000001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)

    def killed(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repair(open_store(tmp_path), report=killed)
    done = repair(open_store(tmp_path))
    assert len(done.lost) == 1 and not repair(open_store(tmp_path)).lost
    assert repair_tool._reports(open_store(tmp_path))


@pytest.mark.parametrize("name", ["9223372036854775808.json", "9" * 200 + ".json"])
def test_a_name_that_is_no_snapshots_number_does_no_harm(tmp_path, name):
    write(tmp_path)
    (tmp_path / "catalog" / name).write_text("x\n")
    repair(open_store(tmp_path))
    assert CacheReader(tmp_path).covers(ALL).all() and not verify(open_store(tmp_path)).problems
    cataloging.update(open_store(tmp_path), CacheReader(tmp_path).header)
