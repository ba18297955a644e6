"""Parts that a user's module adds are used through the command line: trained with, logged, saved and resumed."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from distill.cache import CacheReader
from distill.config import registry
from distill.config.errors import CacheError
from tests.cli import TINY, kill_once, losses, rows, run, write_corpus

# ---------------------------------------------------------------- a codec

TOY_CODEC = """
import torch

from distill.cache import Atoms, Codec, Picks
from distill.config.registry import CODECS, CodecEntry


class Coarse(Codec):
    \"\"\"The most probable ids, in ten-thousandths.\"\"\"

    unbiased = False
    max_code = 10_000

    def __init__(self, config, vocab_size):
        self.max_atoms = config.options["keep"]

    def _pick(self, logits_TV, lse_T, keys_T):
        p_TK, ids_TK = (logits_TV - lse_T[:, None]).exp().topk(self.max_atoms)
        return Picks(ids_TK.int(), p_TK, keys_T, self.entropy(logits_TV, lse_T))

    def atoms(self, picks):
        return Atoms.of(picks.ids_TK, (10_000 * picks.values_TH.nan_to_num()).round())

    def probs(self, atoms):
        return atoms.codes_N / 10_000


def rules(config, vocab_size):
    if not 1 <= config.options.get("keep", 0) <= vocab_size:
        yield f"options is {config.options}; it must say keep, 1 to {vocab_size}"


CODECS.add("coarse", CodecEntry(Coarse, ("options",), rules))
"""


def test_a_codec_is_captured_read_back_and_resumed(tmp_path, monkeypatch):
    (tmp_path / "toy_codec.py").write_text(TOY_CODEC)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    common = [*TINY, write_corpus(tmp_path / "main"), f"data.dir={tmp_path}/data", "plugins=[toy_codec]"]
    teacher = [*common, "job=teacher", "teacher.train.steps=10", "teacher.train.checkpoint_every=3",
               "teacher.train.log_every=1", "cache.codec.name=coarse"]  # fmt: skip
    refused = run(*teacher, f"hydra.run.dir={tmp_path}/refused", code=2)
    assert "cache.codec.options is {}; it must say keep, 1 to 272" in refused.stderr

    teacher.append("cache.codec.options={keep:3}")
    run(*teacher, f"hydra.run.dir={tmp_path}/t")
    kill_once(tmp_path / "killed" / "checkpoints" / "step-00000006", 1, *teacher, f"hydra.run.dir={tmp_path}/killed")
    run(*teacher, f"hydra.run.dir={tmp_path}/killed", "resume=true")
    assert losses(tmp_path / "killed") == losses(tmp_path / "t")

    header = json.loads((tmp_path / "t" / "cache" / "cache.json").read_text())
    assert header["codec"] == {"name": "coarse", "options": {"keep": 3}}
    with pytest.raises(CacheError, match=r"codec\.name is coarse; allowed: systematic"):
        CacheReader(tmp_path / "t" / "cache")
    for tool in (["verify", "--decode"], ["stats"], ["repair", "--dry-run"]):
        command = [sys.executable, "-m", "distill.tools", tool[0], str(tmp_path / "t" / "cache"), *tool[1:]]
        refused = subprocess.run(command, capture_output=True, text=True)
        assert refused.returncode == 2 and "--plugins MODULE" in refused.stderr and "damage" not in refused.stdout
        subprocess.run([*command, "--plugins", "toy_codec"], check=True, capture_output=True)
    monkeypatch.setattr(registry.CODECS, "_entries", dict(registry.CODECS._entries))
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.import_plugins(["toy_codec"]) == []
    whole, resumed = (CacheReader(tmp_path / name / "cache") for name in ("t", "killed"))
    ids = np.flatnonzero(whole.covers(np.arange(whole.header.samples)))
    a, b = (reader.read(ids, whole.digests(ids)).targets for reader in (whole, resumed))
    assert len(ids) == 40 and all(torch.equal(x, y) for x, y in zip(a, b))
    assert a.probs_TK.shape[1] == 3 and a.covered_T.any() and (a.probs_TK[a.covered_T].sum(-1) > 0).all()

    student = [*common, "job=student", "student.train.steps=10", "student.train.checkpoint_every=3",
               "student.train.log_every=1", f"cache.dir={tmp_path}/t/cache", "cache.on_missing=fail"]  # fmt: skip
    run(*student, f"hydra.run.dir={tmp_path}/s")
    kill_once(tmp_path / "again" / "checkpoints" / "step-00000006", 1, *student, f"hydra.run.dir={tmp_path}/again")
    run(*student, f"hydra.run.dir={tmp_path}/again", "resume=true")
    assert losses(tmp_path / "again") == losses(tmp_path / "s")
    assert all(row["student/soft_loss"] > 0 for row in rows(tmp_path / "s") if "student/soft_loss" in row)


# ---------------------------------------------------------------- a loss and a factor

TOY_LOSS = """
import torch

from distill.config.registry import FACTORS, LOSSES
from losses.head import Chunk
from losses.weighting import Mean


class Smoothed:
    \"\"\"Row function: cross entropy with a label that has a tenth of its mass spread evenly over the vocabulary.\"\"\"

    def __init__(self, labels_T, weigh, ids_TK=None, probs_TK=None):
        self.labels_T, self.weigh, self.ids_TK = labels_T, weigh, ids_TK

    def __call__(self, logits_tV, rows, want_grad):
        labels_t1 = self.labels_T[rows, None]
        logprobs_tV = logits_tV.log_softmax(-1)
        hard_t, even_t = -logprobs_tV.gather(-1, labels_t1).squeeze(-1), -logprobs_tV.mean(-1)
        hard_weight_t, soft_weight_t = self.weigh(rows, hard_t, None if self.ids_TK is None else even_t)
        weight_t = hard_weight_t if soft_weight_t is None else hard_weight_t + soft_weight_t
        target_tV = torch.full_like(logprobs_tV, 0.1 / logits_tV.shape[1])
        target_tV.scatter_add_(-1, labels_t1, torch.full_like(hard_t, 0.9)[:, None])
        grad_tV = weight_t[:, None] * (logprobs_tV.exp() - target_tV)
        return Chunk(weight_t * (0.9 * hard_t + 0.1 * even_t), {"hard": hard_t, "evenness": even_t}, grad_tV)


class Fade:
    \"\"\"rate / (rate + steps), so that soft targets count less and less.\"\"\"

    reads_label = False

    def __init__(self, setting, options):
        self.rate, self.device = options["rate"], setting.device

    def init(self):
        return {"steps": torch.zeros(1, device=self.device)}

    def observe(self, state, signals, total):
        return state

    def value(self, state, signals):
        return (self.rate / (self.rate + state["steps"])).expand(len(signals.entropy_T))

    def sums(self, state, signals):
        return signals.covered_T.double().sum()[None]

    def update(self, state, sums):
        return {"steps": state["steps"] + 1}

    def metrics(self, state, signals, value_T):
        return {"fade": Mean(value_T[0], 1.0)}


LOSSES.add("smoothed", Smoothed)
FACTORS.add("fade", Fade)
"""


def test_a_loss_and_a_factor_train_are_logged_and_resumed(tmp_path, monkeypatch):
    (tmp_path / "toy_loss.py").write_text(TOY_LOSS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    common = [*TINY, write_corpus(tmp_path / "main"), f"data.dir={tmp_path}/data", "plugins=[toy_loss]"]
    run(*common, "job=teacher", "teacher.train.steps=10", f"hydra.run.dir={tmp_path}/t")
    student = [*common, "job=student", "student.train.steps=10", "student.train.checkpoint_every=3",
               "student.train.log_every=1", f"cache.dir={tmp_path}/t/cache",
               "weighting@student.weighting=constant"]  # fmt: skip
    toys = ["student.loss=smoothed", "student.weighting.plugins={fade:{rate:2}}"]
    wrong = run(*student, "student.loss=smooth", "student.weighting.plugins={fad:{}}", code=2).stderr
    assert "student.loss is smooth; allowed: mixed, " in wrong and ", smoothed\n" in wrong
    assert "student.weighting.plugins.fad is no factor; allowed: shard_lag, fade" in wrong

    run(*student, *toys, f"hydra.run.dir={tmp_path}/s")
    kill_once(tmp_path / "killed" / "checkpoints" / "step-00000006", 1, *student, *toys,
              f"hydra.run.dir={tmp_path}/killed")  # fmt: skip
    run(*student, *toys, f"hydra.run.dir={tmp_path}/killed", "resume=true")
    logged = [row for row in rows(tmp_path / "s") if "fade" in row]
    assert losses(tmp_path / "killed") == losses(tmp_path / "s")
    assert [row["fade"] for row in logged] == pytest.approx([2 / (2 + step) for step in range(10)])
    assert all(row["loss"] == pytest.approx(0.9 * row["hard_loss"] + 0.1 * row["evenness"]) for row in logged)
    assert all(row["alpha"] == pytest.approx(0.5 * row["fade"] * row["coverage"]) for row in logged)
    assert logged[-1]["hard_loss"] < logged[0]["hard_loss"]


# ---------------------------------------------------------------- a job, a precision and a dispatcher

TOY_JOB = """
import torch
import torch.nn.functional as F

from distill.config.registry import DISPATCHERS, JOBS, PRECISIONS, Job
from distill.model.dispatch import LocalDispatcher
from distill.model.linear import grouped_mm
from distill.model.precision import Numerics
from distill.run import build
from distill.run.run import as_job
from distill.run.trainer import to_checkpoints, train


class Silent(LocalDispatcher):
    \"\"\"The routed experts' results do not come back.\"\"\"

    def combine(self, y_RD, state):
        return 0.0 * super().combine(y_RD, state)


def rounded(x, weight):
    return F.linear(x.bfloat16().float(), weight)


@as_job
def pretrain(run):
    build.prepare(run)
    trainer, _ = build.teacher(run)
    train(run, {"teacher": trainer}, lambda _: to_checkpoints(trainer))
    run.finish({"steps": trainer.step, "weights": sum(p.numel() for p in trainer.engine.model.parameters())})


def rules(config):
    if config.teacher.capture:
        yield "teacher.capture is true; job=pretrain captures nothing"


JOBS.add("pretrain", Job(pretrain, ("teacher",), rules))
PRECISIONS.add("rounded", Numerics(torch.float32, rounded, grouped_mm))
DISPATCHERS.add("silent", Silent)
"""


def test_a_job_a_precision_and_a_dispatcher_train_are_logged_and_resumed(tmp_path, monkeypatch):
    (tmp_path / "toy_job.py").write_text(TOY_JOB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    common = [*TINY, write_corpus(tmp_path / "main"), f"data.dir={tmp_path}/data", "plugins=[toy_job]", "job=pretrain",
              "teacher.train.steps=10", "teacher.train.checkpoint_every=3", "teacher.train.log_every=1"]  # fmt: skip
    assert "teacher.capture is true; job=pretrain captures nothing" in run(*common, code=2).stderr
    common.append("teacher.capture=false")
    found = {}
    for name, keys in (
        ("plain", []),
        ("rounded", ["precision.name=rounded"]),
        ("silent", ["engine.dispatcher=silent", "precision.name=rounded"]),
    ):
        run(*common, *keys, f"hydra.run.dir={tmp_path}/{name}")
        found[name] = [row["loss"] for row in rows(tmp_path / name) if "loss" in row]
    assert len(found["plain"]) == 10 and len(set(map(tuple, found.values()))) == 3
    # Rounding changes little; without the routed experts a step is another one.
    assert found["plain"] == pytest.approx(found["rounded"], rel=2e-3)
    again = [*common, *keys, f"hydra.run.dir={tmp_path}/killed"]
    kill_once(tmp_path / "killed" / "checkpoints" / "step-00000006", 1, *again)
    run(*again, "resume=true")
    assert losses(tmp_path / "killed") == losses(tmp_path / "silent")
    summary = json.loads((tmp_path / "killed" / "summary.json").read_text())
    assert (summary["job"], summary["steps"]) == ("pretrain", 10)
