"""job=lab on the command line, at a size of seconds: lines, starts that go on, students that are the product's own."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.cache import CacheReader
from distill.config.load import resolve
from distill.config.study_plan import with_data
from distill.data.prepare import prepare
from distill.run.lab_caches import folder_of
from distill.run.lab_student import Reversed, Shuffled
from distill.run.lab_study import Study
from tests.cli import PATIENCE, command, default_signals, environment, kill_once, run

SMALL = [
    "job=lab", "study=quick", "lab.only=[size]", "lab.only_arms=[labels,new]", "engine.threads=1",
    "data.corpora.main.max_documents=200", "data.corpora.main.held_out=0.2", "evaluate.samples=16",
    *(f"{role}.train.{key}" for role in ("teacher", "student") for key in ("steps=16", "log_every=8")),
]  # fmt: skip
STUDENTS = 2 * 2 + 2 * 2


def lab(folder: Path, *more: str) -> list[str]:
    return [*SMALL, f"lab.dir={folder}/lab", f"lab.evidence={folder}/quick.jsonl", f"hydra.run.dir={folder}/run", *more]


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "quick.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A study that ran through, and what it printed."""
    folder = tmp_path_factory.mktemp("lab")
    return folder, run(*lab(folder)).stdout


def test_a_line_for_each_student_and_a_page(done):
    folder, out = done
    found = lines(folder)
    assert len(found) == STUDENTS
    assert out.startswith(
        "study quick: 1 regime, 3 seeds, 8 students to train at 8.0 s (a guess), teachers of 3 caches"
    )
    for line in found:
        assert {"study", "regime", "arm", "seed", "phase", "setting", "excess", "loss", "entropy", "alpha", "seconds",
                "tokens", "config", "sources"} <= line.keys()  # fmt: skip
        assert 0 < line["excess"] < 4 and (line["alpha"] > 0) == ("teacher" in line) == (line["arm"] == "new")
    assert [line["seed"] for line in found if line["phase"] == "test"] == [0, 0, 1, 1]
    assert "| size |" in (folder / "quick.md").read_text() and (folder / "quick.svg").exists()
    assert os.listdir(folder / "lab" / "students") == []


def test_a_second_start_adds_none_and_another_setting_its_own(done):
    folder, _ = done
    before = (folder / "quick.jsonl").read_bytes()
    out = run(*lab(folder)).stdout
    assert (folder / "quick.jsonl").read_bytes() == before and " 0 students to train" in out
    run(*lab(folder, "lab.pairs=3"))
    added = lines(folder)[STUDENTS:]
    assert [(line["arm"], line["seed"]) for line in added] == [("labels", 2), ("new", 2)]
    page = (folder / "quick.md").read_text()
    assert "n=3" in page
    (folder / "quick.md").unlink()
    run(*lab(folder, "lab.pairs=3", "lab.summary_only=true", f"lab.dir={folder}/elsewhere"))
    assert (folder / "quick.md").read_text() == page
    run(*lab(folder, "lab.only_arms=[labels,new,shuffled]"))
    assert [line["arm"] for line in lines(folder)[STUDENTS + 2 :]] == ["shuffled", "shuffled"]


def test_a_study_that_was_killed_goes_on(done, tmp_path):
    folder, _ = done
    want = {line["config"]: line["excess"] for line in lines(folder)}
    kill_once(tmp_path / "quick.jsonl", 1500, *lab(tmp_path))
    assert 0 < len(lines(tmp_path)) < STUDENTS
    kill_once(tmp_path / "lab" / "students" / "*" / "metrics.jsonl", 1, *lab(tmp_path))  # in the middle of a student
    run(*lab(tmp_path))
    found = lines(tmp_path)
    assert len(found) == len({line["config"] for line in found}) == STUDENTS
    assert all(line["excess"] == want[line["config"]] for line in found)


def test_ctrl_c_ends_with_a_line(tmp_path):
    path = os.pathsep.join([str(Path(os.sys.executable).parent), os.environ.get("PATH", "")])
    process = subprocess.Popen(
        command(*lab(tmp_path)), env=environment(PATH=path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=default_signals,
    )  # fmt: skip
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "quick.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, err
    assert "what was measured is in lab.evidence; the same command goes on from it" in err and "Traceback" not in err


def test_a_student_of_the_lab_is_the_products_own(done, tmp_path):
    """The oracle: job=student with the same keys on the lab's cache."""
    folder, _ = done
    line = next(line for line in lines(folder) if line["arm"] == "new" and line["phase"] == "test")
    study = Study(resolve(lab(folder)))
    root = folder_of(folder / "lab", study.teachers("size", line["seed"]), study.untils("size"))
    cached = next(root.glob("teacher-0/cache"))
    keys = ["student.weighting.lag.enabled=true", *(f"{key}={value}" for key, value in line["setting"].items())]
    run(*(key for key in SMALL[4:]), "job=student", "study=quick", *keys, f"seed={line['seed']}", "tracking=off",
        f"data.corpora.main.law.draw={line['seed']}", f"cache.dir={cached}", f"data.dir={folder}/lab/data",
        f"hydra.run.dir={tmp_path}/run")  # fmt: skip
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["student_loss"] == line["loss"]
    teacher = json.loads((root / "teachers.json").read_text())
    assert teacher == line["teacher"]


def test_shuffled_targets_are_those_of_another_sample(done):
    folder, _ = done
    study = Study(resolve(lab(folder)))
    root = folder_of(folder / "lab", study.teachers("size", 0), study.untils("size"))
    config = with_data(study.teachers("size", 0)[0], str(folder / "lab" / "data")).data
    corpus = prepare(config, folder / "lab" / "data", 264).train["main"]
    reader = CacheReader(root / "teacher-0" / "cache")
    ids = np.array([0, 3, len(corpus) - 1])
    others = (ids + len(corpus) // 2) % len(corpus)
    found = Shuffled(reader, corpus).read(ids, corpus.take(ids).digests)
    want = reader.read(others, corpus.take(others).digests)
    own = reader.read(ids, corpus.take(ids).digests)
    assert torch.equal(found.targets.ids_TK, want.targets.ids_TK) and torch.equal(found.step_B, want.step_B)
    assert not torch.equal(found.targets.entropy_T, own.targets.entropy_T)


def test_a_reversed_factor_is_one_minus_its_value():
    class Quarter:
        name = "quarter"

        def value(self, state, signals):
            return torch.full((3,), 0.25) * state

    assert torch.equal(Reversed(Quarter()).value(1.0, None), torch.full((3,), 0.75))
    assert Reversed(Quarter()).name == "quarter"
