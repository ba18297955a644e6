"""A loss, gradient norm or weight that is not finite ends every job, and nothing that comes from it is left behind."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file

from distill.cache import CacheReader
from distill.config.errors import ConfigError, DivergenceError
from distill.config.load import resolve
from distill.config.registry import JOBS
from distill.config.schema import EngineConfig
from distill.engine import checkpoint
from distill.engine import dist as engine_dist
from distill.engine.deepspeed_engine import Engine
from distill.model import hf
from distill.run import codistill
from distill.run.models import load_model
from distill.tracking import report
from student import evaluate as student_evaluate
from tests.cli import TINY, command, environment, rows, write_corpus
from tests.workers.diverge import plant

EVERY = [f"{role}.train.{key}" for role in ("teacher", "student") 
         for key in ("checkpoint_every=4", "log_every=4", "eval_every=0")]  # fmt: skip


@pytest.fixture(scope="module")
def ranks():
    before, threads = dict(os.environ), torch.get_num_threads()
    yield engine_dist.start(EngineConfig(threads=1))
    os.environ.clear()
    os.environ.update(before)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return [*TINY, write_corpus(folder), f"data.dir={folder}/packed", "tracking=off", *EVERY]


@pytest.fixture
def start(ranks, data):
    def start(folder, *arguments):
        config = resolve([*data, *arguments])
        JOBS[config.job].run(config, folder, ranks)

    return start


@pytest.fixture(scope="module")
def taught(ranks, data, tmp_path_factory):
    """A healthy teacher with its cache."""
    folder = tmp_path_factory.mktemp("taught") / "run"
    JOBS["teacher"].run(resolve([*data, "job=teacher", "teacher.train.steps=8"]), folder, ranks)
    return folder


def strict(folder: Path) -> int:
    """Parses every JSON of a folder as a strict reader does; how many there were."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    count = 0
    for path in folder.rglob("*"):
        if path.suffix == ".json":
            json.loads(path.read_text(), parse_constant=refuse)
        elif path.suffix == ".jsonl":
            for line in path.read_text().splitlines():
                json.loads(line, parse_constant=refuse)
        else:
            continue
        count += 1
    manifests = [json.loads(path.read_text())["manifest"] for path in folder.rglob("manifest.json")]
    for text in manifests:
        json.loads(text, parse_constant=refuse)
    return count + len(manifests)


def published_steps(cache):
    return np.concatenate([load_file(p)["steps"] for p in sorted((cache / "shards").rglob("*.safetensors"))] or [[]])


@pytest.mark.parametrize("kind", ["loss", "gradient", "logits", "weights"])
@pytest.mark.parametrize("zero", [0, 1])
def test_a_teacher_stops_at_the_last_good_checkpoint(kind, zero, start, tmp_path, monkeypatch):
    """Step 6 of 20, between two rows: a checkpoint of step 4 stays, no target of step 6 or later is published."""
    plant(monkeypatch.setattr, "teacher", 6, 0, kind)
    with pytest.raises(DivergenceError) as caught:
        start(tmp_path / "r", "job=teacher", "teacher.train.steps=20", f"engine.zero={zero}", "cache.shard_samples=4")
    message, found = str(caught.value), {"loss": "loss", "gradient": "gradient norm", "weights": "weights are"}
    assert message.startswith("teacher: ") and "at step 6;" in message and "\n" not in message
    assert found.get(kind, "loss") in message
    assert f"the last good checkpoint is {tmp_path}/r/checkpoints/step-00000004" in message
    assert [p.name for p in (tmp_path / "r" / "checkpoints").iterdir()] == ["step-00000004"]
    assert not (tmp_path / "r" / "summary.json").exists()
    logged = rows(tmp_path / "r")
    assert [row["step"] for row in logged] == [4, 8]
    if kind in ("gradient", "logits"):
        assert None in logged[-1].values() and logged[-1]["lr"] > 0
    assert None not in logged[0].values()
    # Records count the teacher's finished steps: those of step 6 say 5.
    steps = published_steps(tmp_path / "r" / "cache")
    assert sorted(set(steps)) in ([0, 1, 2, 3], [0, 1, 2, 3, 4]) and strict(tmp_path / "r") > 5
    assert report.write(tmp_path / "r").exists()


def test_a_run_that_diverged_goes_on_and_ends_as_one_that_did_not(start, tmp_path, monkeypatch):
    arguments = ["job=teacher", "teacher.train.steps=12"]
    start(tmp_path / "whole", *arguments)
    with monkeypatch.context() as patch:
        plant(patch.setattr, "teacher", 7, 0, "logits")
        with pytest.raises(DivergenceError):
            start(tmp_path / "r", *arguments)
    start(tmp_path / "r", *arguments, "resume=true")
    for name in ("whole", "r"):
        assert strict(tmp_path / name) > 5
    whole, mine = (
        [(row["step"], row["loss"], row["grad_norm"]) for row in rows(tmp_path / name)] for name in ("whole", "r")
    )
    assert mine == whole
    a, b = (checkpoint.newest(tmp_path / name / "checkpoints").tensors("teacher") for name in ("whole", "r"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    records = [
        {s.sample_id: (s.step, bytes(s.data)) for s in CacheReader(tmp_path / name / "cache").samples()}
        for name in ("whole", "r")
    ]
    assert records[0] == records[1]


@pytest.mark.parametrize("kind", ["loss", "gradient", "weights"])
def test_a_teacher_without_capture_and_a_student(kind, start, taught, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        plant(patch.setattr, "teacher", 1, 0, kind)
        with pytest.raises(DivergenceError, match=r"^teacher: .* at step 1; no checkpoint was saved before"):
            start(tmp_path / "t", "job=teacher", "teacher.capture=false", "teacher.train.steps=3")
    plant(monkeypatch.setattr, "student", 7, 0, kind)
    with pytest.raises(DivergenceError, match=r"^student: .* at step 7; .*step-00000004.*student\.optim\.lr"):
        start(tmp_path / "s", "job=student", f"cache.dir={taught}/cache", "student.train.steps=8")
    assert not (tmp_path / "s" / "summary.json").exists() and strict(tmp_path / "s")


def test_a_learning_rate_that_overflows(start, tmp_path, monkeypatch):
    """The weights of the last step: neither loss nor gradient comes after them."""
    monkeypatch.setattr("distill.run.trainer.learning_rate", lambda *_: 1e39)
    with pytest.raises(DivergenceError, match="weights are not finite at step 1"):
        start(tmp_path / "r", "job=teacher", "teacher.train.steps=1")
    assert not (tmp_path / "r" / "checkpoints").exists()


@pytest.mark.parametrize("role", ["teacher", "student", "arm"])
def test_codistillation_and_its_arms(role, start, tmp_path, monkeypatch):
    arguments = ["experiment=smoke", "tracking=off", "job=codistill", "teacher.train.steps=8", "student.train.steps=8",
                 "codistill.rounds=2", "~codistill.arms.constant", "~codistill.arms.step"]  # fmt: skip
    if role == "arm":
        monkeypatch.setattr(codistill, "capture_overhead", lambda *_: _plant_now(monkeypatch))
    else:
        plant(monkeypatch.setattr, role, 6, 0, "loss")
    with pytest.raises(DivergenceError) as caught:
        start(tmp_path / "r", *arguments)
    assert str(caught.value).startswith("student of arm hard: loss" if role == "arm" else f"{role}: loss")
    assert f"a lower {'codistill.arms.hard' if role == 'arm' else f'{role}.optim'}.lr (now " in str(caught.value)
    assert not (tmp_path / "r" / "summary.json").exists()
    assert checkpoint.newest(tmp_path / "r" / "checkpoints") is not None and strict(tmp_path / "r") > 5
    if role == "teacher":
        assert published_steps(tmp_path / "r" / "cache").max() == 3


def _plant_now(monkeypatch):
    plant(monkeypatch.setattr, "student", 6, 0, "loss")
    return 0.0


def test_two_ranks_stop_together(data, tmp_path):
    """Only rank 1 has the fault, long before the next row; rank 0 publishes nothing of that step either."""
    arguments = ["job=teacher", "teacher.train.steps=12", "cache.shard_samples=2", f"hydra.run.dir={tmp_path}/r"]
    start = command(*data, *arguments, ranks=2)
    place = start.index("distill")
    start[place : place + 1] = ["tests.workers.diverge", "teacher", "6", "1", "loss"]
    done = subprocess.run(start, env=environment(), capture_output=True, text=True, timeout=170)
    told = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode != 0 and len(told) == 1, done.stderr[-3000:]
    assert told[0].startswith("error: teacher: loss") and "at step 6;" in told[0] and "step-00000004" in told[0]
    assert "exitcode  : 3" in done.stderr
    steps = published_steps(tmp_path / "r" / "cache")
    assert steps.max() <= 4 and set(steps) >= {0, 1, 2, 3}
    assert [row["step"] for row in rows(tmp_path / "r")] == [4, 8]


def test_one_process_exits_with_3_and_one_line(data, tmp_path):
    arguments = [*data, "job=student", "student.cached=false", "student.train.steps=6", "student.optim.lr=1e12",
                 "student.optim.optimizer=sgd", "student.optim.clip=0",
                 "student.optim.warmup=0", f"hydra.run.dir={tmp_path}/r"]  # fmt: skip
    done = subprocess.run(command(*arguments), env=environment(), capture_output=True, text=True, timeout=170)
    assert done.returncode == 3, done.stderr[-3000:]
    assert sum(line.startswith("error:") for line in done.stderr.splitlines()) == 1
    assert "error: student: " in done.stderr and "not finite at step" in done.stderr
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- models that are not finite


def spoiled_run(source, target, value, role="teacher"):
    """A copy of a run whose newest checkpoint has one number that is not finite; names of file and tensor."""
    found = checkpoint.newest(source / "checkpoints")
    path = target / "checkpoints" / found.folder.name
    path.mkdir(parents=True)
    for name in ("config.yaml", "tokenizer.json"):
        (target / name).write_bytes((source / name).read_bytes())
    file = f"{role}-00000.safetensors"
    tensors = load_tensors(found.folder / file)
    key = "param/layers.1.feed_forward.experts.down_proj"
    tensors[key].view(-1)[7] = value
    save_file(tensors, path / file)
    manifest = json.loads(json.loads((found.folder / "manifest.json").read_text())["manifest"])
    manifest["files"][file] = {"bytes": (path / file).stat().st_size, "xxh3": checkpoint.file_digest(path / file)}
    text = json.dumps(manifest)
    outer = {"xxh3": checkpoint._text_digest(text), "manifest": text}
    (path / "manifest.json").write_text(json.dumps(outer))
    return path / file, key


def test_no_job_takes_a_checkpoint_that_is_not_finite(start, taught, tmp_path):
    file, key = spoiled_run(taught, tmp_path / "bad", value=-torch.inf)
    bad, clean = f"{tmp_path}/bad", f"{taught}"
    jobs = {
        "t": ["job=teacher", f"init_from={bad}", "teacher.train.steps=2"],
        "s": ["job=student", "student.cached=false", f"student.init_from={bad}", "student.train.steps=2"],
        "c": ["job=codistill", f"teacher.init_from={bad}", "experiment=smoke", "tracking=off"],
        "e": ["job=evaluate", f"init_from={bad}"],
        "e2": ["job=evaluate", f"init_from={clean}", f"evaluate.teacher_from={bad}"],
        "x": ["job=export", f"init_from={bad}", "export.role=teacher", f"export.dir={tmp_path}/hf"],
        "b": ["job=backfill", f"init_from={bad}", f"cache.dir={tmp_path}/filled"],
    }
    for name, arguments in jobs.items():
        with pytest.raises(DivergenceError, match="is not finite") as caught:
            start(tmp_path / name, *arguments)
        assert f"{file}: {key}" in str(caught.value), name
        assert not (tmp_path / name / "summary.json").exists()
    assert not (tmp_path / "hf").exists() and not (tmp_path / "filled").exists()
    # An older version saved such a checkpoint: the run does not go on from it.
    with pytest.raises(DivergenceError, match="take an older checkpoint"):
        start(tmp_path / "bad", "job=teacher", "teacher.train.steps=8", "resume=true")


def test_nor_a_hugging_face_folder(start, taught, tmp_path):
    model = load_model(taught, "teacher", None)
    for router in model.routers:
        router.bias.zero_()
    hf.save(model, tmp_path / "hf", max_shard_bytes=20_000)
    file = sorted((tmp_path / "hf").glob("model-*.safetensors"))[1]
    tensors = load_tensors(file)
    key = sorted(tensors)[-1]
    tensors[key].view(-1)[-1] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    (tmp_path / "hf" / "tokenizer.json").write_bytes((taught / "tokenizer.json").read_bytes())
    source, out = f"init_from={tmp_path}/hf", f"export.dir={tmp_path}/out"
    for name, arguments in {
        "t": ["job=teacher", source, "teacher.train.steps=2"],
        "e": ["job=evaluate", source],
        "x": ["job=export", source, out],
        "b": ["job=backfill", source, f"cache.dir={tmp_path}/filled"],
        "f": ["job=backfill", f"teacher.from_=hf:{tmp_path}/hf", f"cache.dir={tmp_path}/filled"],
    }.items():
        with pytest.raises(DivergenceError, match="is not finite") as caught:
            start(tmp_path / name, *arguments)
        assert f"{file}: {key}" in str(caught.value), name
    assert not (tmp_path / "out").exists() and not (tmp_path / "filled").exists()


def test_an_export_that_overflows_is_not_written(taught, tmp_path):
    model = load_model(taught, "teacher", None)
    for router in model.routers:
        router.bias.zero_()
    with torch.no_grad():
        model.norm.weight[3] = 3.4e38  # a number in fp32, none in bf16
    hf.save(model, tmp_path / "fp32")
    with pytest.raises(DivergenceError, match=r"model\.norm\.weight is not finite in bfloat16; the model is not"):
        hf.save(model, tmp_path / "bf16", dtype=torch.bfloat16)
    assert [p.name for p in tmp_path.iterdir()] == ["fp32"]


def test_a_checkpoint_that_is_not_finite_is_not_written(start, taught, tmp_path, monkeypatch):
    """A moment that overflows shows in no loss."""
    state = Engine.state

    def spoiled(self):
        for key, get in state(self):
            bad = key == "exp_avg_sq/head.weight" and self._ds.global_steps > 4
            yield key, (lambda get=get: get() * torch.inf) if bad else get

    monkeypatch.setattr(Engine, "state", spoiled)
    with pytest.raises(DivergenceError, match=r"teacher: exp_avg_sq/head\.weight is not finite: .*step-00000008"):
        start(tmp_path / "r", "job=teacher", "teacher.train.steps=12")
    assert [p.name for p in (tmp_path / "r" / "checkpoints").iterdir()] == ["step-00000004"]


def test_a_loss_on_held_out_text_that_is_not_finite(start, taught, tmp_path, monkeypatch):
    real = student_evaluate.evaluate

    def spoiled(*arguments, **more):
        return real(*arguments, **more)._replace(loss=np.inf)

    monkeypatch.setattr(student_evaluate, "evaluate", spoiled)
    with pytest.raises(DivergenceError, match=r"^the model of init_from=.*: the loss on held-out text is not finite"):
        start(tmp_path / "e", "job=evaluate", f"init_from={taught}")
    with pytest.raises(DivergenceError, match=r"^teacher: the loss on held-out text is not finite; .*step-00000004"):
        start(tmp_path / "t", "job=teacher", "teacher.train.steps=4")
    with pytest.raises(DivergenceError, match=r"^teacher: held-out loss is not finite at step 2; no checkpoint"):
        start(tmp_path / "g", "job=teacher", "teacher.train.steps=4", "teacher.train.eval_every=2")
    assert rows(tmp_path / "g")[-1]["heldout_loss"] is None


def test_a_backfill_publishes_nothing_of_logits_that_are_not_finite(start, taught, tmp_path, monkeypatch):
    """Finite weights whose product overflows on some samples: what was labelled before them stays."""
    from teacher import labelling as labels

    head, seen = labels.head_loss, []

    def overflow(hidden_TD, *arguments, **more):
        seen.append(0)
        return head(hidden_TD * (torch.inf if len(seen) == fault else 1.0), *arguments, **more)

    monkeypatch.setattr(labels, "head_loss", overflow)
    for fault in (2, 6):  # while it is measured, and later
        seen.clear()
        with pytest.raises(DivergenceError, match=r"its log-probabilities of sample \d+ are not finite in precis"):
            start(tmp_path / f"b{fault}", "job=backfill", f"init_from={taught}", f"cache.dir={tmp_path}/c{fault}",
                  "backfill.batch=4", "backfill.unit_samples=8", "cache.shard_samples=4")  # fmt: skip
        assert not (tmp_path / f"b{fault}" / "summary.json").exists()
    assert not (tmp_path / "c2").exists()
    published = [s.sample_id for s in CacheReader(tmp_path / "c6").samples()]
    assert len(published) <= 12 and strict(tmp_path / "c6")


def test_a_configuration_holds_numbers_alone(data):
    with pytest.raises(ConfigError) as caught:
        resolve(
            [*data, "job=teacher", "teacher.optim.lr=nan", "cache.follow_timeout=inf", "teacher.optim.betas=[0.9,nan]"]
        )
    assert [p.split(";")[0] for p in caught.value.problems if "finite" in p] == [
        "teacher.optim.lr is nan", "teacher.optim.betas is nan", "cache.follow_timeout is inf"
    ]  # fmt: skip
