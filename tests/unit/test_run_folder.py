"""A run folder whose records are cut, missing or of other data: one line each."""

import dataclasses
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from distill.config.errors import ConfigError, DataError
from distill.config.load import resolve, to_dict
from distill.run import folder as run_folder
from distill.run.run import Run


@pytest.fixture(scope="module")
def config():
    return resolve(["job=teacher", "resume=true", "data=files", "data.corpora.main.files=[/home/me/a.jsonl]"])


@pytest.fixture
def folder(tmp_path, config):
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(to_dict(config))))
    (tmp_path / "metrics.jsonl").touch()
    return tmp_path


def problems(folder, config):
    return list(run_folder.problems(folder, config))


def test_a_whole_one_and_an_empty_one(folder, config, tmp_path):
    assert problems(folder, config) == [] and problems(tmp_path / "none", config) == []


@pytest.mark.parametrize("damage", [b"job: teacher\n\t: [", b"", b"\xff\xfe\0", b"- 1\n- 2\n", b"a: b", b"job: ${"])
def test_a_damaged_configuration(folder, config, damage):
    (folder / "config.yaml").write_bytes(damage)
    (line,) = problems(folder, config)
    assert line.startswith(f"{folder}/config.yaml is damaged (") and "put it back" in line and "\n" not in line
    with pytest.raises(ConfigError, match="is damaged"):
        run_folder.recorded(folder)


def test_a_missing_configuration(folder, config):
    (folder / "config.yaml").unlink()
    (line,) = problems(folder, config)
    assert line.startswith(f"{folder}/config.yaml is missing; resume=true compares")
    (line,) = problems(folder, dataclasses.replace(config, resume=False))
    assert line == f"hydra.run.dir is {folder}; it holds metrics.jsonl of a run: choose another folder"


def test_a_run_that_was_refused_in_its_first_step_leaves_the_folder_free(folder, config):
    anew = dataclasses.replace(config, resume=False)
    assert problems(folder, anew) == []
    (folder / "metrics.jsonl").write_text('{"job": "teacher", "step": 1}\n')
    (line,) = problems(folder, anew)
    assert line == f"hydra.run.dir is {folder}; it holds a run: set resume=true, or choose another folder"
    (folder / "metrics.jsonl").unlink()
    assert len(problems(folder, anew)) == 1  # a configuration alone may be the user's own


@pytest.mark.parametrize("damage", [b"", b'{"job": "tea', b"3", b"\xff"])
def test_a_summary_that_is_cut(folder, config, damage):
    (folder / "summary.json").write_bytes(damage)
    (line,) = problems(folder, config)
    assert line.startswith(f"{folder}/summary.json is damaged (") and "remove it" in line


def test_home_in_the_record_of_an_older_version(folder, config, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("/home/me/a.jsonl", "~/a.jsonl"))
    assert "~/a.jsonl" in path.read_text() and problems(folder, config) == []


def test_values_are_told_as_they_are_written(folder, config):
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("capture: true", "capture: false").replace("arms: {}", "arms: {a: 1}"))
    assert problems(folder, config) == [
        f"codistill.arms is empty; the run in {folder} was started with a 1",
        f"teacher.capture is true; the run in {folder} was started with false",
    ]


def test_other_data_are_named_each():
    run = object.__new__(Run)
    keys = ("data.tokenizer", "data.corpora.main, training text", "data.corpora.main, held-out text")
    run.folder, run.restored = "RUN", SimpleNamespace(state={"data": dict.fromkeys(keys, "old")})
    run.use(SimpleNamespace(digests=dict.fromkeys(keys, "old")))
    for key in keys:
        with pytest.raises(DataError) as caught:
            run.use(SimpleNamespace(digests=dict.fromkeys(keys, "old") | {key: "new"}))
        (line,) = str(caught.value).splitlines()
        assert line.startswith(f"{key} has digest new; the run in RUN was started with old: put back the files")
    with pytest.raises(DataError) as caught:
        run.use(SimpleNamespace(digests=dict.fromkeys(keys, "new")))
    assert len(str(caught.value).splitlines()) == 3
