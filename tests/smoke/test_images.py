"""Images and text through the whole main job, and through its resumption, evaluation and two ranks."""

import json

import pytest

from tests.cli import TINY, kill_once, losses, rows, run
from tests.shards import headers

SMALL = [
    "experiment=digits",
    *(item for item in TINY if not item.startswith(("data=", "data.tokenizer", "data.sample_tokens"))),
    "data.sample_tokens=48",
    "data.tokenizer.vocab_size=272",
    "data.corpora.main.max_documents=12",
    "data.corpora.digits.max_documents=60",
    *(
        f"{role}.model.vision.{key}={value}"
        for role in ("teacher", "student")
        for key, value in dict(
            hidden_size=16, layers=1, heads=2, mlp_hidden=64, adapter_hidden=16, adapter_out=16
        ).items()
    ),
    "teacher.train.steps=12",
    "student.train.steps=12",
]


@pytest.fixture(scope="module")
def codistilled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images") / "run"
    return folder, run(*SMALL, "job=codistill", f"hydra.run.dir={folder}")


def test_every_arm_is_scored_on_reading_the_digit(codistilled):
    folder, done = codistilled
    summary = json.loads((folder / "summary.json").read_text())
    for arm in ("teacher", "distilled", "hard", "constant"):
        corpora = summary[f"{arm}_corpora"]
        assert set(corpora) == {"main", "digits"}
        assert 0 <= summary[f"{arm}_accuracy"] == corpora["digits"]["accuracy"] <= 1
    assert summary["coverage"] == 1.0
    [head] = [line for line in done.stdout.splitlines() if "held-out loss" in line]
    assert head.split()[-1] == "accuracy"
    assert "<th>accuracy</th>" in (folder / "report.html").read_text()
    # The captions' tokens have targets of the teacher, those of the images none.
    published = headers(folder / "cache" / "digits")
    assert published and all(0 < shard.tokens < 0.7 * 48 * shard.samples for shard in published)


def test_rows_of_metrics_tell_the_corpora_apart(codistilled):
    for job in ("teacher", "student"):
        row = next(r for r in rows(codistilled[0]) if r["job"] == job and "heldout_loss" in r)
        low, high = sorted(row[f"heldout_loss/{name}"] for name in ("main", "digits"))
        assert low <= row["heldout_loss"] <= high and 0 <= row["heldout_accuracy/digits"] <= 1


def test_evaluate_gives_what_training_gave(codistilled, tmp_path):
    folder = codistilled[0]
    run(
        *SMALL, "job=evaluate", f"init_from={folder}", f"evaluate.teacher_from={folder}", f"data.dir={folder}/data",
        f"hydra.run.dir={tmp_path}/e",
    )  # fmt: skip
    got = json.loads((tmp_path / "e" / "summary.json").read_text())
    want = json.loads((folder / "summary.json").read_text())
    assert got["heldout_accuracy/digits"] == want["distilled_accuracy"]
    assert got["heldout_loss"] == pytest.approx(want["distilled_loss"], rel=1e-6)
    assert got["agreement"] == pytest.approx(want["agreement"], rel=1e-6)


def test_two_ranks_train_the_same_teacher(codistilled, tmp_path):
    """Each step's two samples go to two ranks: often one has images and the other has none."""
    arguments = [*SMALL, "job=teacher", "teacher.train.batch=2", f"data.dir={codistilled[0]}/data", "engine=zero1"]
    run(*arguments, f"hydra.run.dir={tmp_path}/two", ranks=2)
    run(*arguments, f"hydra.run.dir={tmp_path}/one")
    for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert dict(a[2:]) == pytest.approx(dict(b[2:]), rel=1e-5)


def test_a_live_teacher_sees_the_pictures(tmp_path):
    common = [*SMALL, f"data.dir={tmp_path}/data", "tracking.report=false"]
    run(*common, "job=teacher", "teacher.capture=false", "teacher.train.steps=4", f"hydra.run.dir={tmp_path}/t")
    live = [*common, "job=student", "student.targets=live", f"teacher.from={tmp_path}/t", "student.hidden_match=0.5",
            "student.loss=jensen_shannon", "student.train.accumulation=2", "student.train.checkpoint_every=2",
            "student.train.steps=6"]  # fmt: skip
    run(*live, f"hydra.run.dir={tmp_path}/one")
    kill_once(tmp_path / "k" / "checkpoints" / "step-00000004", 1, *live, f"hydra.run.dir={tmp_path}/k")
    run(*live, f"hydra.run.dir={tmp_path}/k", "resume=true")
    assert losses(tmp_path / "k") == losses(tmp_path / "one")
    found = [row for row in rows(tmp_path / "one") if "soft_loss" in row]
    assert len(found) == 3 and all(row["coverage"] == 1 and row["soft_grad_norm"] > 0 for row in found)
    assert any("hard_loss/digits" in row for row in found)


def test_faults_are_told_at_once(tmp_path):
    faults = [
        "teacher.model.vision=null",
        "student.model.vision.patch_size=4",
        "student.model.vision.image_token_id=9",
        "evaluate.accuracy_on=digit",
        "data.corpora.main.image_key=image",
    ]
    done = run(*[a for a in SMALL if "teacher.model.vision" not in a], *faults, "job=codistill",
               f"hydra.run.dir={tmp_path}", code=2)  # fmt: skip
    for part in (
        "teacher.model.vision is null; data.corpora have images",
        "student.model.vision makes 16 tokens of a tile, (tile_size / patch_size / shuffle)^2; data.images.tile_tokens",
        "student.model.vision.image_token_id is 9; the tokenizer's <|patch|> is 7",
        "evaluate.accuracy_on is digit; allowed: main, digits",
        "data.corpora.main.image_key is image; source=stdlib takes none",
    ):
        assert part in done.stderr, (part, done.stderr)
    assert "Traceback" not in done.stderr
