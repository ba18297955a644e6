"""Compaction, merging and comparing, against what a slow reader of the format finds before and after."""

import json
import subprocess
import sys
import threading

import numpy as np
import pytest

from distill.cache import CacheReader, CacheWriter
from distill.cache.ledger import ledgers
from distill.cache.open_store import open_store
from distill.config.errors import CacheError
from distill.config.schema import CodecConfig
from distill.tools.commands import COMMANDS, main
from distill.tools.compact import compact
from distill.tools.compare import compare
from distill.tools.merge import merge
from distill.tools.stats import stats
from distill.tools.verify import verify
from tests import format_reader
from tests.workers.cache_writers import SAMPLES, S, V, batch, digests, header, put

MB = 1_000_000


def origins(folder):
    """What each sample's record says of its teacher, by way of a reader; and the mean loss of its shard."""
    reader = CacheReader(folder)
    return {
        sample.sample_id: (sample.step, sample.origin.teacher, sample.origin.source, sample.origin.loss)
        for sample in reader.samples()
    }


def write(folder, writer, parts, **options):
    """parts: (sample ids, step, teacher); one shard each."""
    with CacheWriter(folder, header(), writer=writer, counts_V=np.arange(V) % 7, shard_samples=99, **options) as w:
        for ids, step, teacher in parts:
            put(w, ids, step=step, teacher=teacher)
            w.flush()
        w.finish()


PARTS = [([5, 1, 9], 0, "x"), ([0, 2], 1, "x"), ([7], 2, "x"), ([1, 30, 31], 3, "y"), ([8, 2], 4, "y")]


@pytest.fixture
def cache(tmp_path):
    """Two writers; samples 1 and 2 twice."""
    write(tmp_path / "cache", "b", PARTS[:3])
    write(tmp_path / "cache", "a", PARTS[3:])
    return tmp_path / "cache"


def total_tokens(folder, ids):
    """Tokens with a target, counted from the records."""
    found = format_reader.cache(folder)
    return sum(token is not None for sample in ids for token in found[sample][2])


def check_ledger_counts(folder):
    """Every origin's samples and tokens are those of the records that point at it."""
    reader = CacheReader(folder)
    counted: dict = {}
    for sample in reader.samples():
        key = (sample.shard, sample.origin)
        counted.setdefault(key, []).append(sample.sample_id)
    for (_, origin), ids in counted.items():
        assert origin.samples == len(ids)
        assert origin.tokens == total_tokens(folder, ids)
    assert sum(row.tokens for row in reader.rows) == sum(o.tokens for _, o in counted)


def test_compaction_changes_nothing_that_is_read(cache):
    before, told, order = format_reader.cache(cache), origins(cache), CacheReader(cache)
    old = order.read(np.arange(SAMPLES), digests(np.arange(SAMPLES)))
    done = compact(open_store(cache), shard_bytes=MB)
    assert (done.before, done.after, done.copied, done.dropped) == (5, 1, 9, 2)
    assert format_reader.cache(cache) == before and origins(cache) == told
    check_ledger_counts(cache)
    new = CacheReader(cache)
    assert order.refresh() == 1 and len(order.rows) == len(new.rows) == 1
    for reader in (order, new):
        result = reader.read(np.arange(SAMPLES), digests(np.arange(SAMPLES)))
        assert all(a.equal(b) for a, b in zip(result.targets, old.targets))
        assert result.shard_loss_B.nan_to_num(-1).equal(old.shard_loss_B.nan_to_num(-1))
        assert result.step_B.equal(old.step_B) and reader.finished
    # In the order of steps.
    assert [s.step for s in new.samples()] == sorted(step for step, *_ in told.values())
    assert compact(open_store(cache), shard_bytes=MB).copied == 0
    assert verify(open_store(cache), decode=True).problems == []


def test_compaction_leaves_large_shards_alone_and_fills_up_to_the_size(tmp_path):
    write(tmp_path, "w", [([i, i + 1, i + 2], i, "x") for i in range(0, 39, 3)])
    limit = 3 * max(row.bytes - row.index_bytes for row in CacheReader(tmp_path).rows)
    compact(open_store(tmp_path), shard_bytes=limit)
    rows = CacheReader(tmp_path).rows
    assert 4 <= len(rows) <= 7 and all(row.bytes - row.index_bytes <= limit for row in rows)
    large = [row for row in rows if row.bytes - row.index_bytes >= limit / 2]
    with CacheWriter(tmp_path, header(), writer="w", counts_V=np.arange(V) % 7) as writer:
        put(writer, [39], step=50)
        writer.flush()
        put(writer, [38], step=51)
    before = format_reader.cache(tmp_path)
    touched = {row.shard for row in large if row.last_sample == 38}
    compact(open_store(tmp_path), shard_bytes=limit)
    left = {row.shard for row in CacheReader(tmp_path).rows}
    assert {row.shard for row in large} - touched <= left
    assert format_reader.cache(tmp_path) == before and len(before) == 40


def test_a_live_reader_and_a_live_writer_go_on_during_a_compaction(cache, monkeypatch):
    """A writer publishes between any two steps of it: none of its rows is retired, and the reader never misses one."""
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

    for name in ("distill.tools.repack.publish_shard", "distill.tools.compact.published"):
        module, attribute = name.rsplit(".", 1)
        monkeypatch.setattr(name, meanwhile(getattr(sys.modules[module], attribute)))
    compact(open_store(cache), shard_bytes=1000)
    writer.close()
    reader.refresh()
    assert len(seen) > 12
    assert (
        sorted(format_reader.cache(cache)) == sorted(seen) == np.flatnonzero(reader.covers(np.arange(SAMPLES))).tolist()
    )


def test_purge(cache):
    """Readers of an old view get a clear error, a writer resumes, and what counts is untouched."""
    old, before = CacheReader(cache), format_reader.cache(cache)
    view = old.view
    compact(open_store(cache), shard_bytes=MB)
    assert CacheReader(cache, view).read(np.array([5]), digests([5])).step_B.tolist() == [0]
    waiting = verify(open_store(cache)).notes
    assert len(waiting) == 1 and "5 shards" in waiting[0] and "--purge" in waiting[0]
    done = compact(open_store(cache), shard_bytes=MB, purge=True)
    assert done.purged > 0 and done.copied == 0
    assert len(list((cache / "shards").iterdir())) == 1
    assert format_reader.cache(cache) == before
    with pytest.raises(CacheError, match=r"compact --purge.*refresh the reader"):
        old.read(np.array([5]), digests([5]))
    with pytest.raises(CacheError, match=r"compact --purge"):
        CacheReader(cache, view)
    assert old.refresh() == 1 and old.read(np.array([5]), digests([5])).step_B.tolist() == [0]
    with CacheWriter(cache, header(), writer="b") as writer:
        put(writer, [5], step=0)  # done before: passed over
        put(writer, [33], step=1)
    assert CacheReader(cache).stats()["shards"] == 2
    assert verify(open_store(cache), decode=True)[:2] == ([], [])


def test_tools_on_an_object_store():
    url = "memory://tools/cache"
    write(url, "b", PARTS[:3])
    write(url, "a", PARTS[3:])
    told = origins(url)
    store = open_store(url)
    assert verify(store, decode=True)[:2] == ([], [])
    assert compact(store, shard_bytes=MB, purge=True).copied == 9
    assert origins(url) == told and len(store.names("shards")) == 1
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
    check_ledger_counts(tmp_path / "all")
    names = ledgers(open_store(tmp_path / "all"))
    assert merge(sources, open_store(tmp_path / "all"), shard_bytes=MB).copied == 0
    assert ledgers(open_store(tmp_path / "all")) == names == ["merge", "w"]
    # The records are those of the sources, byte for byte.
    x, y, both = (format_reader.cache(tmp_path / name) for name in ("x", "y", "all"))
    assert both[1] == y[1] and both[3] == x[3] and both[10] == x[10]
    fresh = merge(sources, open_store(tmp_path / "new"), shard_bytes=MB)
    assert fresh.copied == 5 and format_reader.cache(tmp_path / "new")[4] == y[4]
    assert CacheReader(tmp_path / "new").header.stream == CacheReader(tmp_path / "x").header.stream


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


# ---------------------------------------------------------------- stats, command line


def test_stats_are_what_was_put(cache):
    found = stats(open_store(cache))
    assert (found["samples"], found["records"], found["shards"]) == (9, 11, 5)
    assert found["tokens"] == 11 * (S - 1) and found["exact"]
    on_disk = sum(path.stat().st_size for path in (cache / "shards").iterdir())
    assert sum(found["bytes"]["shards"].values()) == on_disk
    assert found["bytes"]["shards"]["sample_ids"] == 8 * 11
    assert found["bytes_per_token"] == pytest.approx(on_disk / found["tokens"])
    assert found["bytes"]["others"]["ledgers"] == sum(p.stat().st_size for p in (cache / "ledger").iterdir())
    losses = [
        -b.label_logprob[b.valid].double().mean().item() for b in (batch(ids, step=step) for ids, step, _ in PARTS)
    ]
    assert found["lag"]["step"] == [0, 1, 2, 3, 4]
    assert found["lag"]["lag"] == pytest.approx([loss - min(losses) for loss in losses], rel=1e-5)
    assert [(o["teacher"], o["samples"], o["first_step"], o["last_step"]) for o in found["origins"]] == [
        ("x", 6, 0, 2),
        ("y", 5, 3, 4),
    ]
    quick = stats(open_store(cache), quick=True)
    assert quick["samples"] == 11 and not quick["exact"]


def test_the_command_line_of_stats(cache, tmp_path, capsys):
    assert main(["stats", str(cache), "--json", "--deep", "4", "--html", str(tmp_path / "page.html")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["sampled"]["tokens"]
        == sum(found["sampled"]["entropy"]["counts"])
        == found["sampled"]["samples"] * (S - 1)
    )
    assert sum(found["sampled"]["mass"]["counts"]) == found["sampled"]["tokens"]
    text = (tmp_path / "page.html").read_text()
    assert "Lag over time" in text and text.count("<figure") == 6
    assert main(["stats", str(cache)]) == 0
    assert "9 of 40 samples, 22.50%" in capsys.readouterr().out
    assert main(["stats", str(tmp_path)]) == 0  # a folder that holds caches


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["stats", "{}/none"], "no cache here"),
        (["verify", "{}/none"], "no cache here"),
        (["compact", "{}/cache", "--shard-mb", "0"], "--shard-mb is 0; allowed is 1 to 4000"),
        (["compact", "{}/cache", "--into", "{}/n", "--purge"], "--purge is no option of --into"),
        (["merge", "{}/cache", "{}/cache"], "both a source and the target"),
        (["compare", "{}/cache", "{}/none"], "no cache here"),
        (["stats", "{}/cache", "--deep", "0"], "--deep is 0"),
        (["estimate", "--vocab-size", "100"], "--tokens is missing"),
        (["estimate", "--tokens", "1e6", "--k", "0", "--codec", "topk"], "--k is 0; allowed: 1 to 255"),
        (["estimate", "--tokens", "1e6", "seed=1"], "it needs --config"),
        (["estimate", "--config", "nothing"], "experiment is nothing; allowed: demo"),
    ],
)
def test_faults_are_told_in_a_line_each(cache, tmp_path, capsys, arguments, said):
    assert main([each.format(tmp_path) for each in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and said in captured.err and "Traceback" not in captured.err


def test_what_looks_at_headers_needs_no_torch(cache):
    for command in (
        ["stats", str(cache)], ["verify", str(cache)], ["--help"], ["estimate", "--tokens", "1e9"],
        *([name, "--help"] for name in COMMANDS),
    ):  # fmt: skip
        code = (
            "import sys; from distill.tools.commands import main\n"
            f"try: main({command!r})\nexcept SystemExit: pass\n"
            "print([m for m in ('torch', 'numba', 'pyarrow', 'omegaconf', 'hydra', 'fsspec') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]"
    done = subprocess.run([sys.executable, "-m", "distill.tools", "verify", str(cache)], capture_output=True, text=True)
    assert done.returncode == 0 and "whole" in done.stdout
