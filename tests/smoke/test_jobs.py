"""The jobs through the real command line, on models of a few thousand parameters."""

import itertools
import json

import pytest
import torch

from distill.model import hf
from tests.cli import TINY, losses, rows, run, write_corpus
from tests.shards import headers


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def codistilled(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("codistill") / "run"
    done = run(
        "experiment=smoke", *TINY, corpus, "job=codistill", "teacher.train.steps=40", "student.train.steps=40",
        "codistill.rounds=10", "student.replay.order=late_first",
        "codistill.arms.hard.order=same", f"hydra.run.dir={folder}",
    )  # fmt: skip
    return folder, done


def test_codistillation_leaves_a_whole_run_folder(codistilled):
    folder, done = codistilled
    summary = json.loads((folder / "summary.json").read_text())
    for key in ("teacher_loss", "hard_loss", "constant_loss", "distilled_loss", "bytes_per_token", "capture_overhead",
                "coverage", "seconds"):  # fmt: skip
        assert isinstance(summary[key], float), key
    assert ("gap_closed" in summary) == (summary["teacher_loss"] < summary["hard_loss"])
    assert summary["coverage"] == 1.0 and 0 < summary["bytes_per_token"] < 100
    for name in ("config.yaml", "report.html", "checkpoints", "cache/cache.json", "data", "wandb",
                 "arms/hard/metrics.jsonl", "arms/constant/summary.json"):  # fmt: skip
        assert (folder / name).exists(), name
    assert "held-out loss" in done.stdout and "distilled" in done.stdout


def test_metrics_are_flat_rows_at_fixed_steps(codistilled):
    found = rows(codistilled[0])
    for job in ("teacher", "student"):
        steps = [r["step"] for r in found if r["job"] == job]
        assert steps == list(range(2, 41, 2)), job
        assert {r["step"] for r in found if r["job"] == job and "heldout_loss" in r} == {6, 12, 18, 24, 30, 36}
    assert all(isinstance(v, str | int | float) for r in found for v in r.values())
    student = next(r for r in found if r["job"] == "student" and r["step"] == 40)
    for name in ("loss", "hard_loss", "soft_loss", "alpha", "coverage", "lag", "teacher_loss", "teacher_lead",
                 "agreement", "expert_entropy", "tokens_per_second", "grad_norm", "lr"):  # fmt: skip
        assert name in student, name
    histogram = json.loads((codistilled[0] / "histograms.jsonl").read_text().splitlines()[0])
    # Counts of all valid tokens of a logged interval.
    assert histogram["name"] == "alpha" and len(histogram["counts"]) == 20 and sum(histogram["counts"]) > 32


def test_late_first_waits_for_half_the_teacher_and_then_interleaves(codistilled):
    order = [r["job"] for r in rows(codistilled[0])]
    first = order.index("student")
    assert order[:first].count("teacher") > len([j for j in order if j == "teacher"]) // 2 - 1
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert changes >= 6  # teacher and student in turns, not one after the other


def test_arms_share_init_and_data(codistilled):
    folder = codistilled[0]
    hard = rows(folder / "arms" / "hard")
    constant = rows(folder / "arms" / "constant")
    # Before the first update both students are the same, so their first hard losses on the same batches are close.
    assert hard[0]["hard_loss"] == pytest.approx(constant[0]["hard_loss"], rel=2e-3)
    assert len(hard) == len(constant) == 20


def test_evaluate_reads_checkpoints_and_gives_what_training_gave(codistilled, tmp_path, corpus):
    folder = codistilled[0]
    run(
        *TINY, corpus, "job=evaluate", f"init_from={folder}", f"evaluate.teacher_from={folder}",
        f"hydra.run.dir={tmp_path}/e", f"data.dir={folder}/data",
    )  # fmt: skip
    got = json.loads((tmp_path / "e" / "summary.json").read_text())
    want = json.loads((folder / "summary.json").read_text())
    assert got["heldout_loss"] == pytest.approx(want["distilled_loss"], rel=1e-6)
    assert got["agreement"] == pytest.approx(want["agreement"], rel=1e-6)
    assert 0 <= got["ece"] <= 1 and got["perplexity"] == pytest.approx(2.718281828 ** got["heldout_loss"], rel=1e-5)


def test_a_hugging_face_folder_starts_a_job(tmp_path, corpus, codistilled):
    from distill.run.models import load_model

    model = load_model(codistilled[0], "student", None)
    for router in model.routers:
        router.bias.zero_()
    hf.save(model, tmp_path / "hf")
    run(
        *TINY, corpus, "job=student", "student.cached=false", "student.train.steps=2", f"init_from={tmp_path}/hf",
        f"hydra.run.dir={tmp_path}/s", f"data.dir={codistilled[0]}/data",
    )  # fmt: skip
    trained = rows(tmp_path / "s")[-1]["hard_loss"]
    assert trained < rows(codistilled[0] / "arms" / "hard")[0]["hard_loss"] - 0.1  # it did not start from noise
    assert torch.equal(hf.load(tmp_path / "hf").head.weight, model.head.weight)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_ranks_train_the_same_teacher(launcher, tmp_path, corpus, codistilled):
    arguments = [
        *TINY,
        corpus,
        "job=teacher",
        "teacher.train.steps=6",
        f"data.dir={codistilled[0]}/data",
        "engine=zero1",
    ]
    run(*arguments, f"hydra.run.dir={tmp_path}/two", ranks=2, launcher=launcher)
    run(*arguments, f"hydra.run.dir={tmp_path}/one")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        assert a[:2] == b[:2]
        assert dict(a[2:]) == pytest.approx(dict(b[2:]), rel=1e-5)
    assert {shard.writer for shard in headers(tmp_path / "two" / "cache")} == {"teacher-00000", "teacher-00001"}
    got = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert got["teacher_loss"] == pytest.approx(
        json.loads((tmp_path / "one" / "summary.json").read_text())["teacher_loss"], rel=1e-5
    )


def test_multirun_trains_each_value_in_its_own_folder(tmp_path, corpus, codistilled):
    run(
        "--multirun", *TINY, corpus, "job=student", "student.cached=false", "student.train.steps=2", "seed=1,2",
        f"hydra.sweep.dir={tmp_path}/sweep", f"data.dir={codistilled[0]}/data",
    )  # fmt: skip
    first, second = (losses(tmp_path / "sweep" / n) for n in "01")
    assert first != second
