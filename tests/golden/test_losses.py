"""Losses of a tiny codistillation, written down: a change that moves them must show that it means to.

`UPDATE_GOLDEN=1 make test ARGS=tests/golden` writes the file anew; its diff belongs to the commit.
"""

import json
import os
from pathlib import Path

import pytest

from tests.cli import TINY, losses, run, write_corpus

GOLDEN = Path(__file__).with_name("losses.json")


def test_losses_are_those_written_down(tmp_path):
    run(
        *TINY, write_corpus(tmp_path), "job=codistill", "teacher.train.steps=20",
        "student.train.steps=20", "codistill.rounds=10", f"hydra.run.dir={tmp_path}/run",
    )  # fmt: skip
    got = {f"{job} {step}": dict(values) for job, step, *values in losses(tmp_path / "run")}
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(got, indent=1) + "\n")
    want = json.loads(GOLDEN.read_text())
    assert got.keys() == want.keys()
    for row, values in want.items():
        # Other processors round alike to about here.
        assert got[row] == pytest.approx(values, rel=2e-4), row
