"""What tools print of a cache, and the command line of all of them."""

import json
import os
import subprocess
import sys

import pytest

from distill.cache.open_store import open_store
from distill.tools.commands import COMMANDS, main
from distill.tools.compact import compact
from distill.tools.stats import stats
from tests.tool_caches import PARTS, counting, two_writers, write
from tests.workers.cache_writers import S, batch

MB = 1_000_000


@pytest.fixture
def cache(tmp_path):
    return two_writers(tmp_path / "cache")


def test_stats_are_what_was_put(cache):
    found = stats(open_store(cache))
    assert (found["samples"], found["records"], found["shards"]) == (9, 11, 5)
    assert found["tokens"] == 11 * (S - 1) and found["exact"]
    on_disk = sum(shard.bytes for shard in counting(cache))
    assert sum(found["bytes"]["shards"].values()) == on_disk
    assert found["bytes"]["shards"]["sample_ids"] == 8 * 11
    assert found["bytes"]["shards"]["records"] == sum(shard.records for shard in counting(cache))
    assert found["bytes_per_token"] == pytest.approx(on_disk / found["tokens"])
    assert found["bytes"]["others"]["catalog"] == sum(p.stat().st_size for p in (cache / "catalog").iterdir())
    everything = sum(p.stat().st_size for p in (cache / "shards").rglob("*") if p.is_file())
    assert found["bytes"]["others"]["marks and leftovers"] == everything - on_disk
    losses = [
        -b.label_logprob[b.valid].double().mean().item() for b in (batch(ids, step=step) for ids, step, _ in PARTS)
    ]
    assert [(c["teacher"], c["source"], c["step"]) for c in found["losses"]] == [
        ("x", "capture", [0, 1, 2]), ("y", "capture", [3, 4]),
    ]  # fmt: skip
    assert [loss for c in found["losses"] for loss in c["loss"]] == pytest.approx(losses, rel=1e-5)
    assert [(o["teacher"], o["samples"], o["first_step"], o["last_step"]) for o in found["origins"]] == [
        ("x", 6, 0, 2),
        ("y", 5, 3, 4),
    ]
    streams = [(w["name"], w["count"], w["shards"], w["marks"], w["finished"], w["alive"]) for w in found["writers"]]
    assert streams == [("a", 4, 2, 2, True, False), ("b", 5, 3, 2, True, False)]


def test_quick_stats_are_those_of_the_snapshot_from_its_footers_alone(cache, monkeypatch):
    several = stats(open_store(cache), quick=True)
    assert several["samples"] == 11 and not several["exact"]
    compact(open_store(cache), shard_bytes=MB)
    whole = stats(open_store(cache))
    assert [(w["name"], w["shards"], w["marks"], w["replaced"]) for w in whole["writers"]] == [
        ("a", 0, 2, 2), ("b", 0, 2, 3), ("compact", 1, 0, 0),
    ]  # fmt: skip
    assert whole["bytes"]["of no use"]["replaced by compaction"] > 0
    write(cache, "z", [([33], 9, "x")], index_every=10**6)
    for path in (cache / "catalog").glob("*.json"):
        if path.stem > f"{whole['snapshot']['number']:09d}":
            path.unlink()
    real = os.open
    opened = []
    monkeypatch.setattr(os, "open", lambda path, *args, **kw: (opened.append(str(path)), real(path, *args, **kw))[1])
    quick = stats(open_store(cache), quick=True)
    assert not any("/shards/" in path for path in opened) and any(path.endswith(".listing") for path in opened)
    for name in ("samples", "records", "shards", "tokens", "atoms", "origins", "losses", "flops", "bytes_per_token"):
        assert quick[name] == whole[name], name
    assert quick["exact"] and stats(open_store(cache))["samples"] == 10


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
    assert "Teacher&#x27;s loss by its step" in text and text.count("<figure") == 5
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
