"""A disk that fills up at any byte: the error names the path, nothing half-written stays, what was there stays."""

import errno
import json
import os
import resource
import subprocess

import numpy as np
import pytest
import torch

from distill.cache import CacheReader
from distill.config.errors import CacheError, CheckpointError, DataError
from distill.config.files import naming, write_text
from distill.config.schema import CorpusConfig, DataConfig, Source, TokenizerConfig
from distill.data.prepare import prepare
from distill.engine import checkpoint
from distill.engine.dist import Dist
from distill.model import Transformer, hf
from distill.tools.export_cache import export
from distill.tracking.jsonl import JsonLines
from tests.cli import TINY, run, write_corpus
from tests.unit.test_cache_tools import write
from tests.unit.test_model_attention import config_of
from tests.workers.cache_writers import SAMPLES


@pytest.fixture(params=["limit", "tmpfs"])
def disk(request, tmp_path):
    """A folder and a function that lets no more than some bytes be written; by a limit of the process (EFBIG) or,
    where it may be mounted, by a file system that is full (ENOSPC)."""
    if request.param != "tmpfs":
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        folder = tmp_path / "disk"
        folder.mkdir()
        yield folder, lambda room: resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        return
    folder = tmp_path / "tmpfs"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        yield folder, lambda room: fill(folder, room)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder, room):
    """Leaves about `room` bytes."""
    free = os.statvfs(folder)
    (folder / "ballast").write_bytes(bytes(free.f_bavail * free.f_frsize - room // 4096 * 4096))


def names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != "ballast")


class Parameters:
    """As much of an engine as a checkpoint asks for."""

    def __init__(self, floats):
        self.tensor = torch.arange(floats, dtype=torch.float32)

    def state(self):
        yield "param/x", lambda: self.tensor


ALONE = Dist(0, 1, torch.device("cpu"))


def test_a_checkpoint(disk):
    folder, limit = disk
    root = folder / "checkpoints"
    checkpoint.save(root, 1, {"model": Parameters(1000)}, {"at": 1}, ALONE, 1)
    before = names(folder)
    limit(40_000)
    with pytest.raises(CheckpointError, match=r"step-00000002\.tmp: cannot write the checkpoint: (No space|File too)"):
        checkpoint.save(root, 2, {"model": Parameters(100_000)}, {"at": 2}, ALONE, 1)
    assert names(folder) == before and os.listdir(root) == ["step-00000001"]
    found = checkpoint.newest(root)
    assert found.state == {"at": 1} and torch.equal(found.tensors("model")["param/x"], torch.arange(1000.0))


def test_a_manifest_that_cannot_be_written(tmp_path, monkeypatch):
    def full(path, text):
        with naming(path):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

    checkpoint.save(tmp_path, 1, {"model": Parameters(10)}, {}, ALONE, 1)
    monkeypatch.setattr(checkpoint, "write_text", full)
    with pytest.raises(CheckpointError, match="quota"):
        checkpoint.save(tmp_path, 2, {"model": Parameters(10)}, {}, ALONE, 1)
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_a_model(disk):
    folder, limit = disk
    torch.manual_seed(0)
    limit(20_000)
    with pytest.raises(OSError, match=r"\.out\.partial/model\.safetensors") as caught:
        hf.save(Transformer(config_of()), folder / "out")
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG) and names(folder) == []


def test_a_text(disk):
    folder, limit = disk
    path = folder / "summary.json"
    write_text(path, "old")
    limit(8192)
    with pytest.raises(OSError) as caught:
        write_text(path, "x" * 100_000)
    assert caught.value.filename == str(path) and path.read_text() == "old" and names(folder) == ["summary.json"]


def test_metrics(disk):
    folder, limit = disk
    rows = JsonLines(folder / "metrics.jsonl", None)
    limit(8192)
    with pytest.raises(OSError) as caught:
        for step in range(10_000):
            rows.write({"job": "teacher", "step": step})
    assert caught.value.filename == str(folder / "metrics.jsonl")
    rows.close()  # nothing waits that would fail again
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines[:-1]] == list(range(len(lines) - 1))


def test_shards_of_a_cache(disk):
    folder, limit = disk
    write(folder / "cache", "teacher", [([0, 1, 2], 0, "x")])
    before, limit_of = CacheReader(folder / "cache").stats(), 8192
    limit(limit_of)
    with pytest.raises(CacheError, match=rf"{folder}/cache/.*: (No space left on device|File too large)"):
        write(folder / "cache", "other", [(list(range(SAMPLES)), n, "x") for n in range(50)])
    assert not [name for name in names(folder) if name.endswith(".tmp")]
    assert CacheReader(folder / "cache").stats()["samples"] >= before["samples"]


def test_a_table_of_targets(disk, tmp_path):
    folder, limit = disk
    write(tmp_path / "cache", "teacher", [(list(range(SAMPLES)), 0, "x")])
    reader = CacheReader(tmp_path / "cache")
    limit(4096)
    with pytest.raises(CacheError, match=rf"{folder}/targets\.parquet: cannot be written: (No space|File too)"):
        export(reader, folder / "targets.parquet")
    assert names(folder) == []


def test_a_packed_corpus(disk, tmp_path):
    folder, limit = disk
    (tmp_path / "text.txt").write_text("".join(f"line {n} of a text\n" for n in range(20_000)))
    config = DataConfig(
        {"main": CorpusConfig(Source.files, [str(tmp_path / "text.txt")], held_out=0.0)},
        TokenizerConfig(vocab_size=300), sample_tokens=16,
    )  # fmt: skip
    limit(100_000)
    with pytest.raises(DataError, match=rf"data\.dir is {folder}/data; cannot be written: (No space|File too)"):
        prepare(config, folder / "data", 300)
    left = names(folder)
    assert all(name.startswith("data/tokenizer-") and ".tmp" not in name for name in left), left


def test_reading_needs_no_temporary_folder(disk, tmp_path, monkeypatch):
    folder, limit = disk
    write(tmp_path / "cache", "teacher", [(list(range(SAMPLES)), 0, "x")])
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    limit(0)
    assert CacheReader(tmp_path / "cache").covers(np.arange(SAMPLES)).all()
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: [str(tmp_path / "nothing")])
    assert CacheReader(tmp_path / "cache").covers(np.arange(SAMPLES)).all()


def test_a_run_ends_with_one_line(tmp_path):
    """The writer thread's failure, too, ends the training that goes on beside it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        done = run(
            *TINY, write_corpus(tmp_path), "job=teacher", "teacher.train.steps=2000", "teacher.train.log_every=1000",
            "teacher.train.eval_every=0", "tracking=off", f"data.dir={tmp_path}/data", f"hydra.run.dir={folder}/run",
            code=2,
        )  # fmt: skip
        errors = [line for line in done.stderr.splitlines() if "rror" in line]
        assert len(errors) == 1 and errors[0].startswith(f"error: {folder}/run/cache/"), done.stderr
        assert errors[0].endswith("No space left on device") and "Traceback" not in done.stderr
        assert not [name for name in names(folder) if name.endswith(".tmp")]
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
