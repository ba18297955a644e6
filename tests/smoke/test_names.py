"""Folders and files whose names have `::`, spaces, brackets and signs that mean something elsewhere."""

import json
import os
import subprocess
import sys

from distill.config.spelling import quoted
from tests.cli import TINY, environment, run, write_corpus

NAME = "a::b c:d [e] #f?g%20h*ä'\"&;"


def test_a_run_with_such_names(tmp_path):
    place = tmp_path / NAME
    write_corpus(place / "text[1]")
    (place / "text[1]" / "corpus.jsonl").rename(place / "text[1]" / "x[0]::y.jsonl")
    data = [f"data.dir={quoted(f'{place}/data')}", f"cache.dir={quoted(f'{place}/c::c')}"]
    names = [f"data.corpora.main.files=[{quoted(f'{place}/text[1]/{each}')}]" for each in ("x[0]::y.jsonl", "*.jsonl")]
    run(*TINY, *data, names[0], "job=teacher", "tracking=offline", "teacher.train.steps=4", "evaluate.samples=2",
        f"hydra.run.dir={quoted(f'{place}/run')}")  # fmt: skip
    packed = sorted(os.listdir(place / "data"))
    run(*TINY, *data, names[1], "job=student", "tracking=off", "student.train.steps=4", "evaluate.samples=2",
        f"hydra.run.dir={quoted(f'{place}/student')}")  # fmt: skip
    assert json.loads((place / "student" / "summary.json").read_text())["coverage"] > 0
    assert sorted(os.listdir(place / "data")) == packed  # both patterns name one file
    run("job=export", f"init_from={quoted(f'{place}/run')}", f"export.dir={quoted(f'{place}/model')}",
        "export.drop_router_bias=true", f"hydra.run.dir={quoted(f'{place}/export')}")  # fmt: skip
    assert (place / "model" / "config.json").exists()
    for arguments in (["stats", "c::c", "--html", "s:t::.html"], ["verify", "c::c"], ["merge", "c::c", "m::"],
                      ["export", "c::c", "t:u::v.parquet"], ["compare", "c::c", "m::"]):  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "distill.tools", *arguments], cwd=place, capture_output=True, text=True,
            env=environment(PYTHONPATH=os.getcwd()),
        )  # fmt: skip
        assert done.returncode == 0, (arguments, done.stderr)
    assert {"s:t::.html", "m::", "t:u::v.parquet"} <= set(os.listdir(place))
