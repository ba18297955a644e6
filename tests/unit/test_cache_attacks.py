"""Faults that somebody found who attacked the cache from outside."""

import contextlib
import json
import os
import shutil

import numpy as np
import pytest
import torch

from distill.cache import CacheReader, CacheWriter, cataloging
from distill.cache.format import shard_name
from distill.cache.loss_curve import LossSums
from distill.cache.open_store import open_store
from distill.config.errors import CacheError
from distill.tools import repack
from distill.tools import repair as repair_tool
from distill.tools.compact import compact
from distill.tools.estimate import from_cache
from distill.tools.export_cache import export
from distill.tools.histograms import histograms
from distill.tools.merge import merge
from distill.tools.repair import repair
from distill.tools.stats import stats
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


# ---------------------------------------------------------------- damaged listings


def damage_listings(folder, at):
    for path in (folder / "catalog").glob("*.listing"):
        data = bytearray(path.read_bytes())
        data[at if at >= 0 else json.loads(footer_of(data))["entries"] * 44 + 16 + 5] ^= 1
        path.write_bytes(data)


def footer_of(data):
    return bytes(data[data.rindex(b'{"cache"') :])


def pass_over(folder, other):
    """All that goes over a whole cache; what it comes to."""
    reader = CacheReader(folder)
    return {
        "samples": sorted((s.sample_id, s.step, s.data) for s in reader.samples()),
        "stats": reader.stats()["samples"],
        "export": export(reader, other / "file.parquet").samples,
        "tool": stats(open_store(folder))["samples"],
        "histograms": histograms(open_store(folder), 9)["tokens"],
        "estimate": from_cache(open_store(folder), reader.header),
        "merge": merge([open_store(folder)], open_store(other / "merged"), shard_bytes=10**6).copied,
    }


@pytest.mark.parametrize("at", [3, -1], ids=["entries", "origins"])
@pytest.mark.parametrize("writers", [1, 2])
def test_a_damaged_listing_is_in_the_way_of_nothing(tmp_path, at, writers, caplog):
    folder = tmp_path / "a"
    for number in range(writers):
        write(folder, ALL[6 * number : 6 * number + 6], writer=f"w{number}")
    before = pass_over(folder, tmp_path / "before")
    damage_listings(folder, at)
    caplog.clear()
    assert pass_over(folder, tmp_path / "after") == before and ".listing is damaged" in caplog.text
    write(folder, [39], writer="z")
    assert merge([open_store(folder)], open_store(tmp_path / "before" / "merged"), shard_bytes=10**6).copied == 1
    assert compact(open_store(folder), shard_bytes=10**6).after == 1
    assert len(list(CacheReader(folder).samples())) == 6 * writers + 1
    assert not any(map(repair_tool._reports, [open_store(folder)])) and not CacheReader(folder).covers([38]).any()


def test_a_writer_leaves_a_damaged_listing_alone(tmp_path, monkeypatch, caplog):
    """It adds its own, and so stays quick; whoever compacts makes the damaged one anew."""
    monkeypatch.setattr(cataloging, "_ALIKE", 2)
    write(tmp_path, ALL[:6], writer="a")
    damage_listings(tmp_path, 3)
    write(tmp_path, ALL[6:], writer="b")
    assert "it stays as it is" in caplog.text
    (newest, *_) = sorted((tmp_path / "catalog").glob("*.json"), reverse=True)
    assert len(json.loads(newest.read_text())["listings"]) == 2
    assert CacheReader(tmp_path).covers(ALL).all()


@pytest.mark.parametrize("index_every", [1, 64])
def test_a_writer_does_without_a_catalog_that_it_cannot_write(tmp_path, index_every, caplog):
    with CacheWriter(tmp_path, header(), writer="a", shard_samples=3, index_every=index_every) as cache:
        shutil.rmtree(tmp_path / "catalog")
        (tmp_path / "catalog").write_text("in the way")
        for i in ALL:
            put(cache, [i])
        cache.finish()
    assert "catalog" in caplog.text
    reader = CacheReader(tmp_path)
    assert reader.covers(ALL).all() and reader.finished
    (tmp_path / "catalog").unlink()
    cataloging.update(open_store(tmp_path), reader.header)
    assert not verify(open_store(tmp_path)).problems


# ---------------------------------------------------------------- what counts


def test_a_replaced_shard_that_a_pinned_view_needs_is_missed(tmp_path):
    write(tmp_path, ALL[:6])
    view = CacheReader(tmp_path).view
    write(tmp_path, ALL[6:], writer="b")
    compact(open_store(tmp_path), shard_bytes=10**6)
    assert not verify(open_store(tmp_path)).problems
    name = shard_name("a", 1)
    (tmp_path / name).unlink()
    problems = verify(open_store(tmp_path)).problems
    assert problems and all(name in each and "catalog/00000000" in each for each in problems)
    done = repair(open_store(tmp_path))
    assert not done.lost and any(name in line for line in done.lines)
    assert not verify(open_store(tmp_path)).problems and repair(open_store(tmp_path)) == repair_tool.Repair()
    assert CacheReader(tmp_path).covers(ALL).all()
    with pytest.raises(CacheError, match=name):
        CacheReader(tmp_path, view)


def test_a_purge_is_no_damage(tmp_path):
    for number in range(3):
        write(tmp_path, ALL[4 * number : 4 * number + 4], step=number, writer="abz"[number])
        compact(open_store(tmp_path), shard_bytes=10**6, purge_age=0.0 if number else None)
        assert not verify(open_store(tmp_path)).problems


@pytest.mark.parametrize("names", ["ab", "dz", "zd"])
def test_whose_record_counts_stays_the_same_through_compactions_that_are_killed(tmp_path, names, monkeypatch):
    """Two writers have other records of the same samples at the same step; half-way the one has been copied."""
    folder = tmp_path / names[0]
    for name in names:
        with CacheWriter(tmp_path / name, header(), writer=name, shard_samples=2) as cache:
            for i in ALL:
                if name == names[1]:  # whose shards are copied first
                    put(cache, [20 + i], step=0)
                cache.put(*batch([i], step=i % 3 * (name == names[0])), step=5, tokens_seen=0, teacher="t")
    shutil.copytree(tmp_path / names[1] / "shards", folder / "shards", dirs_exist_ok=True)
    cataloging.update(open_store(folder), CacheReader(folder).header)
    want = {s.sample_id: s.data for s in CacheReader(folder).samples()}
    assert len(want) == 2 * len(ALL)

    def same(folder):
        reader = CacheReader(folder)
        assert {s.sample_id: s.data for s in reader.samples()} == want
        assert {i: reader.records([i])[0].data for i in want} == want

    real, left = repack.publish_shard, [0]

    def publish(*args, **kwargs):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(*args, **kwargs)

    monkeypatch.setattr(repack, "publish_shard", publish)
    for kill in range(1, 8):
        cut = tmp_path / f"cut {kill}"
        shutil.copytree(folder, cut)
        left[0] = kill
        with contextlib.suppress(KeyboardInterrupt):
            compact(open_store(cut), shard_bytes=1500)
        shutil.copytree(cut, bare := tmp_path / f"bare {kill}")
        shutil.rmtree(bare / "catalog")
        same(bare)
        same(cut)
        cataloging.update(open_store(cut), CacheReader(cut).header)
        same(cut)
        left[0] = 99
        compact(open_store(cut), shard_bytes=10**6)
        same(cut)
    assert not verify(open_store(cut)).problems


# ---------------------------------------------------------------- what is asked for


READS = {
    "halves": lambda r: r.covers([1.7]),
    "float": lambda r: r.records(np.array([3.0])),
    "complex": lambda r: r.steps(torch.tensor([3]) * 1j),
    "text": lambda r: r.digests(["3"]),
    "huge": lambda r: r.covers([2**64]),
    "beyond": lambda r: r.covers(np.array([2**64 - 1], np.uint64)),
    "columns": lambda r: r.covers([[3], [8]]),
    "one digest": lambda r: r.read([3, 3], digests([3])),
    "more digests": lambda r: r.read([3], digests([3, 8])),
    "negative digest": lambda r: r.read([3], [-1]),
    "float digest": lambda r: r.read([3], digests([3]).astype(float)),
}


@pytest.mark.parametrize("name", READS)
def test_what_is_read_is_named_in_whole_numbers(tmp_path, name):
    with CacheWriter(tmp_path, header(), writer="w") as writer:
        put(writer, [3, 8])
    with pytest.raises(CacheError, match=f"cache {tmp_path}: "):
        READS[name](CacheReader(tmp_path))


@pytest.mark.parametrize(
    "view",
    [{}, [], 3, "x", {"snapshot": 0}, {"streams": {}}, {"snapshot": "0", "streams": {}}, {"snapshot": 0, "streams": []},
     {"snapshot": 0, "streams": {"w": "1"}}, {"snapshot": 0, "streams": {"w": -1}}, {"snapshot": -2, "streams": {}},
     {"snapshot": 0.0, "streams": {"w": 1}}, {"snapshot": 0, "streams": {"w": 1.5}}, {"snapshot": True, "streams": {}},
     {"snapshot": 0, "streams": {"../w": 1}}, {"snapshot": 10**30, "streams": {}}, {"snapshot": 0, "streams": {1: 1}},
     {"snapshot": 0, "streams": {"w": None}}, {"snapshot": 0, "streams": {"w": 2}, "rows": 3}],
    ids=repr,
)  # fmt: skip
def test_a_view_that_no_reader_had_is_refused(tmp_path, view):
    with CacheWriter(tmp_path, header(), writer="w") as writer:
        put(writer, [3, 8])
    with pytest.raises(CacheError, match=f"cache {tmp_path}: the view is .*; expected is"):
        CacheReader(tmp_path, view)
