"""Packed data whose source files are gone, and folders that can only be read."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distill.config.errors import DataError
from distill.config.schema import CorpusConfig, DataConfig, Source, TokenizerConfig
from distill.data.prepare import prepare
from tests.cli import TINY, environment, run, write_corpus


def config(folder, **changes):
    corpus = {"held_out": 0.2} | {k: v for k, v in changes.items() if k in ("held_out", "text_key")}
    files = [str(folder / "*.jsonl")]
    return DataConfig(
        {"main": CorpusConfig(Source.files, files, **corpus)},
        TokenizerConfig(vocab_size=changes.get("vocab_size", 280)), sample_tokens=changes.get("sample_tokens", 16),
    )  # fmt: skip


@pytest.fixture
def text(tmp_path):
    write_corpus(tmp_path / "text")
    return tmp_path / "text"


def test_what_was_packed_is_used(tmp_path, text, capsys):
    before = prepare(config(text), tmp_path / "data", 300)
    there = sorted(tmp_path.glob("data/*/*"))
    shutil.rmtree(text)
    after = prepare(config(text), tmp_path / "data", 300)
    assert after.digests == before.digests and sorted(tmp_path.glob("data/*/*")) == there
    assert "data.corpora.main: its files are gone; " in capsys.readouterr().err
    with pytest.raises(DataError, match="no tokenizer was trained on these files"):
        prepare(config(tmp_path / "other"), tmp_path / "data", 300)


@pytest.mark.parametrize("change", [{"sample_tokens": 32}, {"held_out": 0.3}, {"vocab_size": 290}])
def test_other_settings_are_other_data(tmp_path, text, change):
    prepare(config(text), tmp_path / "data", 300)
    shutil.rmtree(text)
    what = "nothing was packed from" if "sample_tokens" in change else "no tokenizer was trained on"
    with pytest.raises(DataError, match=rf"data\.corpora\.main\.files has .*; no file matches .*{what} these files"):
        prepare(config(text, **change), tmp_path / "data", 300)


def test_two_that_were_made_from_these_files_are_named(tmp_path, text):
    prepare(config(text), tmp_path / "data", 300)
    write_corpus(text, documents=50)
    prepare(config(text), tmp_path / "data", 300)
    shutil.rmtree(text)
    with pytest.raises(DataError, match=r"tokenizer-[0-9a-f]{16}, tokenizer-[0-9a-f]{16} were made from these files"):
        prepare(config(text), tmp_path / "data", 300)


# ---------------------------------------------------------------- read-only


def read_only(folder: Path, arguments: list[str], cwd: Path) -> subprocess.CompletedProcess:
    """Runs a command for which `folder` is mounted read-only."""
    mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, str(folder), *arguments], capture_output=True, text=True, cwd=cwd,
        env=environment(PYTHONPATH=str(Path.cwd())), timeout=170,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run, its packed data, and no text any more."""
    folder = tmp_path_factory.mktemp("read") / "only"
    probe = read_only(folder.parent, ["touch", str(folder.parent / "x")], folder.parent)
    if "Read-only file system" not in probe.stderr:
        pytest.skip("nothing can be mounted read-only here")
    text = write_corpus(folder / "text")
    job = [*TINY, text, f"data.dir={folder}/data", "evaluate.samples=2"]
    run(*job, "job=teacher", "tracking=off", "teacher.train.steps=8", f"hydra.run.dir={folder}/run")
    shutil.rmtree(folder / "text")
    shutil.rmtree(folder / "run" / "cache" / "locks")
    return folder, job


def state(folder):
    return {p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in folder.rglob("*")}


@pytest.mark.parametrize(
    "arguments",
    [
        ["stats", "CACHE", "--html", "OUT/stats.html"],
        ["verify", "CACHE", "--decode"],
        ["repair", "CACHE", "--dry-run"],
        ["compare", "CACHE", "CACHE"],
        ["export", "CACHE", "OUT/targets.parquet"],
        ["merge", "CACHE", "OUT/merged"],
        ["compact", "CACHE", "--into", "OUT/compact"],
        ["estimate", "--like", "CACHE", "--tokens", "1e9"],
    ],
)
def test_tools_on_a_cache_that_can_only_be_read(trained, tmp_path, arguments):
    folder, _ = trained
    before = state(folder)
    names = [a.replace("CACHE", f"{folder}/run/cache").replace("OUT", str(tmp_path)) for a in arguments]
    done = read_only(folder, [sys.executable, "-m", "distill.tools", *names], tmp_path)
    assert done.returncode == 0, done.stderr
    assert state(folder) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["job=student", "student.train.steps=4", "cache.dir=RUN/cache"],
        ["job=teacher", "teacher.train.steps=4", "teacher.capture=false", "init_from=RUN"],
        ["job=evaluate", "init_from=RUN", "evaluate.teacher_from=RUN"],
        ["job=backfill", "init_from=RUN", "cache.dir=RUN/cache", "backfill.dry_run=true",
         "data.tokenizer.file=RUN/tokenizer.json"],
        ["job=export", "init_from=RUN", "export.dir=OUT/model", "export.drop_router_bias=true"],
    ],
)  # fmt: skip
def test_jobs_on_folders_that_can_only_be_read(trained, tmp_path, arguments):
    """The packed data's source files are gone, too."""
    folder, job = trained
    before = state(folder)
    own = [a.replace("RUN", f"{folder}/run").replace("OUT", str(tmp_path)) for a in arguments]
    command = [sys.executable, "-m", "distill", *job, *own, "tracking=off", f"hydra.run.dir={tmp_path}/run"]
    done = read_only(folder, command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert state(folder) == before


def test_what_must_be_written_names_the_folder(trained, tmp_path):
    folder, job = trained
    other = [each.replace("data.sample_tokens=16", "data.sample_tokens=32") for each in job]
    write_corpus(tmp_path)
    command = [sys.executable, "-m", "distill", *other, f"data.corpora.main.files=[{tmp_path}/corpus.jsonl]"]
    done = read_only(folder, [*command, "job=teacher", f"hydra.run.dir={tmp_path}/run"], tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"error: data.dir is {folder}/data; cannot be written: Read-only file system" in done.stderr
