"""Every file that a job or a tool writes has the mode that `open` gives, every folder that of `mkdir`."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distill.model.tensors import save_tensors
from tests.cli import TINY, command, environment, write_corpus

SHORT = ["teacher.train.steps=6", "student.train.steps=6", "codistill.rounds=1", "evaluate.samples=4"]


def mode(path):
    return stat.S_IMODE(os.lstat(path).st_mode)


@pytest.mark.parametrize("umask", [0o002, 0o027, 0o077])
def test_weights(tmp_path, umask):
    before = os.umask(umask)
    try:
        open(tmp_path / "file", "w").close()
        save_tensors({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    finally:
        os.umask(before)
    assert mode(tmp_path / "x.safetensors") == mode(tmp_path / "file")
    assert len(os.listdir(tmp_path)) == 2


def test_what_makes_files_of_other_modes_stands_in_one_place():
    """Libraries and literals that do not follow the umask."""
    found = {
        (str(path), word)
        for folder in ("distill", "losses", "teacher", "student")
        for path in Path(folder).rglob("*.py")
        for word in ("save_file(", "mkstemp", "NamedTemporaryFile", "mkdtemp", "0o6", "0o7")
        if word in path.read_text()
    }
    assert {each for each in found if each[1] != "0o6"} == {
        ("distill/model/tensors.py", "save_file("),
        ("distill/data/tables.py", "NamedTemporaryFile"),  # gone when it has been read
    }
    for path, _ in found:
        assert not re.search(r"0o6(?!66\b)", Path(path).read_text()), path


def test_all_that_is_written(tmp_path):
    umask = 0o027

    def start(arguments, code=0):
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
        done = subprocess.run(
            arguments, umask=umask, env=environment(PATH=path), capture_output=True, text=True, timeout=170
        )
        assert done.returncode == code, done.stderr[-3000:]

    before = os.umask(umask)
    try:  # the oracle: what Python makes without any thought of modes
        open(tmp_path / "file", "w").close()
        os.mkdir(tmp_path / "folder")
        os.mkdir(tmp_path / "out")
        corpus = write_corpus(tmp_path / "text")
    finally:
        os.umask(before)
    out = tmp_path / "out"
    job = [*TINY, corpus, *SHORT, f"data.dir={out}/data", "tracking.console=off"]
    start(command(*job, "experiment=smoke", "tracking=off", "job=codistill", f"hydra.run.dir={out}/run"))
    start(command(*job, "job=backfill", f"init_from={out}/run", f"data.tokenizer.file={out}/run/tokenizer.json",
                  f"cache.dir={out}/filled", f"hydra.run.dir={out}/backfill"))  # fmt: skip
    start(command("job=export", f"init_from={out}/run", f"export.dir={out}/model", "export.drop_router_bias=true",
                  "export.max_shard_gb=0.00005", f"hydra.run.dir={out}/export"))  # fmt: skip
    cache, tools = f"{out}/run/cache", [sys.executable, "-m", "distill.tools"]
    start([*tools, "merge", cache, f"{out}/merged"])
    start([*tools, "compact", cache, "--into", f"{out}/compact"])
    start([*tools, "compact", cache])
    start([*tools, "stats", cache, "--html", f"{out}/stats.html"])
    start([*tools, "export", cache, f"{out}/deep/folder/targets.parquet"])
    shard = min((out / "merged" / "shards").rglob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    start([*tools, "repair", f"{out}/merged"], code=1)  # a record is lost

    found = sorted(out.rglob("*"))
    for name in ("run/report.html", "run/arms/hard/config.yaml", "model/config.json", "filled/cache.json", "stats.html",
                 "deep/folder/targets.parquet", "merged/quarantine", "run/tokenizer.json"):  # fmt: skip
        assert out / name in found, name
    kinds = {path.suffix for path in found if path.is_file()}
    assert kinds >= {".safetensors", ".json", ".jsonl", ".yaml", ".html", ".arrow", ".npy", ".parquet"}, kinds
    wrong = [
        f"{path.relative_to(out)}: {mode(path):o}"
        for path in found
        if mode(path) != mode(tmp_path / ("folder" if path.is_dir() else "file"))
    ]
    assert not wrong, "\n".join(wrong)
