"""Compaction, merging and comparing, against what a slow reader of the format finds before and after."""

import sys
import threading

import numpy as np
import pytest

from distill.cache import CacheHeader, CacheReader, CacheWriter, cataloging
from distill.cache.open_store import open_store
from distill.cache.tail import writers_of
from distill.config.errors import CacheError
from distill.config.schema import CodecConfig
from distill.tools.commands import main
from distill.tools.compact import compact
from distill.tools.compare import compare
from distill.tools.merge import merge
from distill.tools.stats import stats
from distill.tools.verify import verify
from tests import format_reader
from tests.tool_caches import PARTS, check_origin_counts, counting, files, origins, two_writers, write
from tests.workers.cache_writers import SAMPLES, S, V, digests, header, put

MB = 1_000_000


@pytest.fixture
def cache(tmp_path):
    return two_writers(tmp_path / "cache")


def test_compaction_changes_nothing_that_is_read(cache):
    before, told, order = format_reader.cache(cache), origins(cache), CacheReader(cache)
    losses = order.losses
    old = order.read(np.arange(SAMPLES), digests(np.arange(SAMPLES)))
    done = compact(open_store(cache), shard_bytes=MB)
    assert (done.before, done.after, done.copied, done.dropped) == (5, 1, 9, 2)
    assert format_reader.cache(cache) == before and origins(cache) == told
    check_origin_counts(cache)
    new = CacheReader(cache)
    assert order.refresh() == 1 and order.view == new.view and len(counting(cache)) == 1
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
    limit = 3 * max(shard.records for shard in counting(tmp_path))
    compact(open_store(tmp_path), shard_bytes=limit)
    there = counting(tmp_path)
    assert 4 <= len(there) <= 7 and all(shard.records <= limit for shard in there)
    large = {(shard.writer, shard.seq): shard for shard in there if shard.records >= limit / 2}
    with CacheWriter(tmp_path, header(), writer="w", counts_V=np.arange(V) % 7) as writer:
        put(writer, [39], step=50)
        writer.flush()
        put(writer, [38], step=51)
    before = format_reader.cache(tmp_path)
    touched = {place for place, shard in large.items() if shard.last_sample == 38}
    compact(open_store(tmp_path), shard_bytes=limit)
    left = {(shard.writer, shard.seq) for shard in counting(tmp_path)}
    assert large.keys() - touched <= left
    assert format_reader.cache(tmp_path) == before and len(before) == 40


def test_what_is_superseded_as_a_whole_is_replaced(tmp_path):
    """With the next shard, or by one without samples; its losses stay in the sums."""
    write(tmp_path, "w", [([1, 2], 0, "x"), ([3], 5, "x"), ([1, 2], 6, "x")])
    limit = 2 * max(shard.records for shard in counting(tmp_path)) - 100
    before, losses = format_reader.cache(tmp_path), CacheReader(tmp_path).losses
    assert compact(open_store(tmp_path), shard_bytes=limit).dropped == 2
    with CacheWriter(tmp_path, header(), writer="w", counts_V=np.arange(V) % 7) as writer:
        put(writer, [1, 2, 3], step=9, teacher="x")
    old = {(shard.writer, shard.seq) for shard in counting(tmp_path)}
    losses.update(counting(tmp_path)[-1].losses)
    before = format_reader.cache(tmp_path)
    done = compact(open_store(tmp_path), shard_bytes=10, purge_age=0)
    assert (done.copied, done.dropped, done.after) == (0, 3, 1) and done.purged.shards > 0
    assert len(old & set(files(tmp_path))) == 1
    for _ in range(2):
        assert CacheReader(tmp_path).losses == losses and format_reader.cache(tmp_path) == before
        cataloging.update(open_store(tmp_path), CacheHeader.load(tmp_path), is_rebuilding=True)


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

    for name in ("repack.publish_shard", "compact.snapshot_view", "compact.shards_of"):
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
