"""The needle experiment in small through the real command line, and evaluation beyond the trained length."""

import json

import pytest

from tests.cli import rows, run

SMALL = [
    "experiment=needle",
    "data.sample_tokens=64",
    "data.corpora.main.max_documents=400",
    "data.corpora.main.held_out=0.1",
    "data.corpora.main.needle.longest=60",
    "student.model.hidden_size=16",
    "student.model.layers=2",
    "student.model.chunk_size=16",
    "student.model.max_positions=256",
    "student.train.batch=4",
    "student.train.steps=4",
    "student.train.log_every=2",
    "student.train.eval_every=0",
    "evaluate.trained_tokens=64",
    "evaluate.needle.lengths=[64,128]",
    "evaluate.needle.depths=[0,1]",
    "evaluate.needle.trials=2",
    "evaluate.samples=8",
    "engine.threads=1",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("needle")
    run(*SMALL, f"hydra.run.dir={folder}/run", f"data.dir={folder}/data")
    return folder


def test_a_student_learns_and_is_tried_in_one_run(trained):
    summary = json.loads((trained / "run" / "summary.json").read_text())
    assert summary["needle"]["lengths"] == [64, 128] and summary["needle"]["trained_tokens"] == 64
    assert 0 <= summary["needle_accuracy"] <= 1 and 0 <= summary["needle_accuracy_across_chunks"] <= 1
    assert max(summary["loss_by_position"]["last"]) <= 70  # the last bin may reach over the end
    report = (trained / "run" / "report.html").read_text()
    assert "Needle in a haystack" in report and "beyond the trained length, 64" in report


def test_evaluation_goes_beyond_the_trained_length(trained, tmp_path):
    beyond = ["job=evaluate", f"init_from={trained}/run", f"data.dir={trained}/data", "data.sample_tokens=192"]
    run(*SMALL, *beyond, "data.corpora.main.needle.longest=180", f"hydra.run.dir={tmp_path}/e")
    summary = json.loads((tmp_path / "e" / "summary.json").read_text())
    position = summary["loss_by_position"]
    assert max(position["first"]) >= 128 and position["trained_tokens"] == 64 and position["chunk_size"] == 16
    assert sum(position["tokens"]) == summary["tokens"]
    (row,) = rows(tmp_path / "e")
    assert row["job"] == "evaluate" and row["needle_accuracy"] == summary["needle_accuracy"]
    assert "Loss by position" in (tmp_path / "e" / "report.html").read_text()


def test_more_than_the_model_admits_is_one_clear_error(trained, tmp_path):
    evaluate = [*SMALL, "job=evaluate", f"init_from={trained}/run", f"data.dir={trained}/data"]
    long = run(*evaluate, "evaluate.needle.lengths=[300]", f"hydra.run.dir={tmp_path}/a", code=2)
    assert "are to follow; the model's max_positions is 256" in long.stderr and "Traceback" not in long.stderr
    # The run's own configuration would allow it, the model that it finds does not.
    lengths = ["data.corpora.main.needle.shortest=300", "data.corpora.main.needle.longest=500"]
    longer = ["student.model.max_positions=1024", "data.sample_tokens=512", *lengths]
    found = run(*evaluate, *longer, "evaluate.needle.lengths=[]", f"hydra.run.dir={tmp_path}/b", code=2)
    assert "the model's max_positions is 256" in found.stderr and "Traceback" not in found.stderr
