"""Preparation under kills, rivals and damage: nothing half-done is ever seen."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from distill.config.errors import DataError
from distill.config.schema import CorpusConfig, DataConfig, Source, TokenizerConfig
from distill.data.packed import PackedCorpus
from distill.data.prepare import Prepared, prepare
from tests.cli import PATIENCE

CODE = """
import os, signal, sys, time
from pathlib import Path
from distill.config.schema import CorpusConfig, DataConfig, Source, TokenizerConfig
from distill.data import packed, prepare as module
folder, text, moment = sys.argv[1:]
kill = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
packed.BATCH_TOKENS = 1000
if moment == "first":
    packed.SplitWriter.add = kill
elif moment == "middle":
    write, calls = packed.digests, []
    packed.digests = lambda columns: (calls.append(1), len(calls) > 3 and kill(), write(columns))[-1]
elif moment == "close":
    packed.SplitWriter.close = kill
elif moment == "rename":
    rename = Path.rename
    Path.rename = lambda self, target: kill() if "main" in str(target) else rename(self, target)
elif moment == "slow":
    pack = module.pack
    def slow(*args):
        pack(*args)
        Path(folder, "packed").touch()
        while not Path(folder, "go").exists():
            time.sleep(0.01)
    module.pack = slow
data = module.prepare(
    DataConfig({"main": CorpusConfig(Source.files, [text])}, TokenizerConfig(vocab_size=300), sample_tokens=16),
    Path(folder), 300)
print(data.train["main"].digest)
"""


@pytest.fixture
def text(tmp_path) -> Path:
    """A glob of text files: what reads them starts faster than what reads tables."""
    (tmp_path / "text").mkdir()
    for i in range(200):
        (tmp_path / "text" / f"{i:03}.txt").write_text(f"document {i} " + "words and more words " * (i % 9))
    return tmp_path / "text" / "*.txt"


def ours(folder: Path, text: Path) -> Prepared:
    corpus = CorpusConfig(Source.files, [str(text)])
    return prepare(DataConfig({"main": corpus}, TokenizerConfig(vocab_size=300), sample_tokens=16), folder, 300)


def command(folder: Path, text: Path, moment: str) -> list[str]:
    return [sys.executable, "-c", CODE, str(folder), str(text), moment]


def visible(folder: Path) -> list[str]:
    return sorted(path.name.split("-")[0] for path in folder.iterdir() if not path.name.startswith("."))


@pytest.mark.parametrize("moment", ["first", "middle", "close", "rename"])
def test_a_killed_packing_leaves_nothing_visible_and_the_next_one_succeeds(tmp_path, text, moment):
    folder = tmp_path / "data"
    killed = subprocess.run(command(folder, text, moment), capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert visible(folder) == ["tokenizer"]
    [left] = folder.glob(".*.tmp")
    assert ours(folder, text).train["main"].digest == ours(tmp_path / "fresh", text).train["main"].digest
    assert visible(folder) == ["main", "tokenizer"]
    assert left.exists()  # it might be another process' work
    old = time.time() - 7200
    for path in (*left.rglob("*"), left):
        os.utime(path, (old, old))
    ours(folder, text)
    assert not left.exists()


def test_two_processes_at_once_do_no_harm(tmp_path, text):
    folder = tmp_path / "data"
    slow = subprocess.Popen(command(folder, text, "slow"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + PATIENCE
        while not (folder / "packed").exists():
            assert time.monotonic() < deadline and slow.poll() is None, slow.communicate()
            time.sleep(0.01)
        digest = ours(folder, text).train["main"].digest  # first at the goal, while the other has all but renamed
        (folder / "go").touch()
        said, complaint = slow.communicate(timeout=PATIENCE)
    finally:
        slow.kill()
    assert slow.returncode == 0, complaint
    assert said.strip() == digest
    assert visible(folder) == ["go", "main", "packed", "tokenizer"] and not list(folder.glob(".*.tmp"))


def test_a_started_race_ends_well(tmp_path, text):
    folder = tmp_path / "data"
    racers = [subprocess.Popen(command(folder, text, ""), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {racer.communicate(timeout=PATIENCE)[0] for racer in racers}
    assert [racer.returncode for racer in racers] == [0, 0] and len(said) == 1
    assert visible(folder) == ["main", "tokenizer"] and not list(folder.glob(".*.tmp"))


def test_every_flipped_bit_of_the_samples_is_found_or_harmless(tmp_path, text):
    data = ours(tmp_path / "data", text)
    corpus = data.train["main"]
    whole = corpus.take(np.arange(len(corpus)))
    [path] = (tmp_path / "data").glob("main-*/train.arrow")
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    found = 0
    for at in rng.integers(0, len(good), 150):
        bad = bytearray(good)
        bad[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        try:
            damaged = PackedCorpus(path.parent, "train", "main")
            for now, before in zip(damaged.take(np.arange(len(corpus)))[:4], whole):
                assert np.array_equal(now, before)
        except DataError as error:
            assert "train.arrow" in str(error)
            found += 1
    assert found > 130


def test_missing_and_cut_files_are_named(tmp_path, text):
    ours(tmp_path / "data", text)
    [folder] = (tmp_path / "data").glob("main-*")
    for name in ("train.json", "train.counts.npy", "train.arrow"):
        good = (folder / name).read_bytes()
        for content in (good[: len(good) // 2], b"", None):
            (folder / name).unlink()
            if content is not None:
                (folder / name).write_bytes(content)
            else:
                (folder / name).touch()
            with pytest.raises(DataError, match=r"train\.arrow: not a packed corpus: .*remove .*main-"):
                ours(tmp_path / "data", text)
        (folder / name).write_bytes(good)
    ours(tmp_path / "data", text)


def test_a_folder_that_cannot_be_written(tmp_path, text):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.dir is .*file/data; cannot be written: Not a directory"):
        ours(tmp_path / "file" / "data", text)
