"""Each job once in FP8, emulated, through the real command line."""

import json

import pytest

from tests.cli import TINY, rows, run, write_corpus


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A teacher trained in fp8, and the keys of its run but for the job."""
    folder = tmp_path_factory.mktemp("fp8")
    common = [*TINY, write_corpus(folder / "main"), f"data.dir={folder}/data", "precision=fp8", "cache.shard_samples=4",
              *(f"{role}.model.kv_heads=2" for role in ("teacher", "student")),
              *(f"{role}.train.{key}" for role in ("teacher", "student") for key in
                ("steps=4", "accumulation=2", "eval_every=0", "activation_checkpointing=true"))]  # fmt: skip
    run(*common, "job=teacher", f"hydra.run.dir={folder}/t")
    return folder, common


def test_a_student_trains_and_is_evaluated(taught, tmp_path):
    folder, common = taught
    run(*common, "job=student", f"cache.dir={folder}/t/cache", f"hydra.run.dir={tmp_path}/s")
    assert {row["step"] for row in rows(tmp_path / "s") if 5 < row.get("loss", 0) < 6} == {2, 4}
    run(*common, "job=evaluate", f"init_from={tmp_path}/s", f"hydra.run.dir={tmp_path}/e")
    # With the same products, of weights as the last step has left them.
    assert summary(tmp_path / "e")["heldout_loss"] == pytest.approx(summary(tmp_path / "s")["student_loss"], rel=1e-6)


def test_a_backfill_labels_what_the_teacher_did_not(taught, tmp_path):
    folder, common = taught
    run(*common, "job=backfill", f"init_from={folder}/t", f"cache.dir={folder}/t/cache", "backfill.max_samples=8",
        "backfill.unit_samples=8", f"hydra.run.dir={tmp_path}/b")  # fmt: skip
    assert summary(tmp_path / "b")["samples"] == 8


def test_codistillation_by_tensor_with_all_products_in_fp8(taught, tmp_path):
    _, common = taught
    run(*common, "job=codistill", "codistill.rounds=2", "precision.recipe=tensor", "precision.grad_weight=fp8",
        f"hydra.run.dir={tmp_path}/c")  # fmt: skip
    found = [row["loss"] for row in rows(tmp_path / "c") if "loss" in row]
    assert len(found) == 4 and all(5 < loss < 6 for loss in found)
