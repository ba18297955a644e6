"""A cache on an object store through the real command line: a teacher writes it, a student follows it."""

import json
import os
import subprocess

import pytest

from distill.cache import CacheReader
from tests.cli import PATIENCE, TINY, command, environment, rows, run, write_corpus
from tests.objects import ENVIRONMENT, object_store


@pytest.fixture
def server(monkeypatch):
    with object_store(monkeypatch) as server:
        for name, value in ENVIRONMENT.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", server.url)
        yield server


def test_teacher_and_student_meet_on_an_object_store(server, tmp_path):
    corpus, url = write_corpus(tmp_path / "corpus"), "s3://shelf/runs/cache"
    shared = [*TINY, corpus, f"cache.dir={url}", f"data.dir={tmp_path}/data"]
    student = subprocess.Popen(
        command(
            *shared, "job=student", "student.train.steps=12", "cache.follow=true", f"hydra.run.dir={tmp_path}/student"
        ),
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        run(*shared, "job=teacher", "teacher.train.steps=12", f"hydra.run.dir={tmp_path}/teacher")
        out, _ = student.communicate(timeout=PATIENCE)
    finally:
        student.kill()
    assert student.returncode == 0, out
    assert json.loads((tmp_path / "student" / "summary.json").read_text())["coverage"] == 1.0
    assert "soft_loss" in rows(tmp_path / "student")[-1]
    assert CacheReader(url).stats()["samples"] == 48
    assert not (tmp_path / "teacher" / "cache").exists() and not os.path.exists("s3:")
    # What is there is refused, as on a disk; and a mistake is one line.
    again = run(*shared, "job=teacher", "teacher.train.steps=2", f"hydra.run.dir={tmp_path}/again", code=2)
    assert f"cache.dir is {url}; it holds targets of another run" in again.stderr
    wrong = run(*shared, "job=student", "cache.dir=s3://nowhere/x", f"hydra.run.dir={tmp_path}/wrong", code=2)
    assert "s3://nowhere/x: no cache here" in wrong.stderr and "Traceback" not in wrong.stderr
