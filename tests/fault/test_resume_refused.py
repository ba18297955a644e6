"""What a run may not go on with: other data, other ranks, records that are cut; one line each, and nothing changed."""

import json
import shutil

import pytest

from tests.cli import TINY, losses, run, write_corpus


def errors(done):
    assert "Traceback" not in done.stderr, done.stderr
    found = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert not [line for line in found if "{" in line or "[" in line], found
    return found


def resume(start, *more, ranks=1):
    return errors(run(*start, *more, "resume=true", code=2 if ranks == 1 else 1, ranks=ranks))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Runs without a cache and their text: one with checkpoints, cut before its end."""
    folder = tmp_path_factory.mktemp("resume")
    text = write_corpus(folder / "text")
    (folder / "text" / "corpus.jsonl").rename(folder / "text" / "a.jsonl")
    start = [*TINY, text.replace("corpus.jsonl", "*.jsonl"), "job=teacher", "teacher.capture=false", "tracking=off",
             "teacher.train.steps=8", "teacher.train.checkpoint_every=4", "teacher.train.eval_every=0",
             "teacher.train.keep_checkpoints=2", "evaluate.samples=2"]  # fmt: skip
    run(*start, f"hydra.run.dir={folder}/run")
    (folder / "run" / "summary.json").rename(folder / "summary.json")
    return folder, start


@pytest.fixture
def cut(finished, tmp_path):
    """A copy of the run, and how it goes on."""
    folder, start = finished
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.copytree(folder / "text", tmp_path / "text")
    named = [each.replace(str(folder), str(tmp_path)) for each in start]
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(folder), str(tmp_path)))
    return tmp_path, [*named, f"hydra.run.dir={tmp_path}/run"]


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "data" not in p.parts}


def test_another_corpus(cut):
    folder, start = cut
    before = contents(folder / "run")
    (folder / "text" / "b.jsonl").write_text(json.dumps({"text": "one more text " * 30}) + "\n")
    found = resume(start)
    named = [line.removeprefix("error: ").split(" has digest")[0] for line in found]
    assert "data.corpora.main, training text" in named
    for line in found:
        assert f"; the run in {folder}/run was started with " in line and "start anew in another folder" in line
    assert contents(folder / "run") == before
    (folder / "text" / "b.jsonl").unlink()
    (folder / "text" / "a.jsonl").touch()  # the same text at another time is no other corpus
    run(*start, "resume=true")
    assert (folder / "run" / "summary.json").exists()


def test_a_tokenizer_of_the_same_name(cut, finished):
    folder, start = cut
    tokenizer = folder / "t.json"
    record = json.loads((folder / "run" / "tokenizer.json").read_text())
    tokenizer.write_text(json.dumps(record))
    other = [*start[:-1], f"data.tokenizer.file={tokenizer}", f"hydra.run.dir={folder}/other"]
    run(*other)
    (folder / "other" / "summary.json").unlink()
    record["model"]["merges"].pop()
    tokenizer.write_text(json.dumps(record))
    found = resume(other)
    assert found[0].startswith("error: data.tokenizer has digest ") and len(found) >= 2
    assert json.loads((folder / "other" / "tokenizer.json").read_text()) != record


def test_a_damaged_configuration_and_a_missing_one(cut):
    folder, start = cut
    config, before = folder / "run" / "config.yaml", contents(folder / "run")
    config.write_bytes(before[config][:301] + b"\n\t: [")
    (line,) = resume(start)
    assert line.startswith(f"error: {config} is damaged (") and "put it back" in line
    config.unlink()
    (line,) = resume(start)
    assert line.startswith(f"error: {config} is missing; resume=true compares") and "put it back" in line
    assert contents(folder / "run") == {p: data for p, data in before.items() if p != config}


def test_damaged_and_deleted_checkpoints(cut, finished):
    folder, start = cut
    root = folder / "run" / "checkpoints"
    for weights in root.glob("*/*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-1])
    (line,) = errors(run(*start, "resume=true", code=2))
    assert "bytes; its manifest has" in line and f"{root} has no other checkpoint that is whole" in line
    shutil.rmtree(root)
    done = run(*start, "resume=true")
    assert f"{root} has no checkpoint: the run starts from its beginning" in done.stdout + done.stderr
    assert losses(folder / "run") == losses(finished[0] / "run")
