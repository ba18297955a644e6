"""Losses and live teachers through the command line: trained, logged, killed and resumed, on two ranks, exported."""

import json

import pytest
from safetensors import safe_open

from tests.cli import TINY, kill_once, losses, rows, run, write_corpus

PLAIN = ["weighting@student.weighting=constant", "tracking.report=false"]
CACHED = {
    "forward_kl": ["student.loss_options.temperature=2"],
    "reverse_kl": [],
    "jensen_shannon": ["student.loss_options.beta=0.3"],
    "skew_kl": [],
    "skew_reverse_kl": ["student.loss_options.temperature=0.5"],
    "alpha_beta": [],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A teacher that captured top-k, one that captured draws, and what all runs on their corpus share."""
    folder = tmp_path_factory.mktemp("live")
    common = [*TINY, *PLAIN, write_corpus(folder / "main"), f"data.dir={folder}/data", "teacher.train.steps=10",
              "student.train.steps=10", "student.train.log_every=1"]  # fmt: skip
    run(*common, "job=teacher", "cache=topk", "cache.codec.k=8", f"hydra.run.dir={folder}/t")
    return folder, common


def logged(folder):
    return [row for row in rows(folder) if row["job"] == "student" and "soft_loss" in row]


@pytest.mark.parametrize("loss", CACHED)
def test_a_loss_trains_on_a_topk_cache(made, tmp_path, loss):
    folder, common = made
    run(*common, "job=student", f"cache.dir={folder}/t/cache", "student.weighting.alpha=1", "student.optim.lr=1e-2",
        f"student.loss={loss}", *CACHED[loss], f"hydra.run.dir={tmp_path}/s")  # fmt: skip
    found = logged(tmp_path / "s")
    assert len(found) == 10 and found[-1]["soft_loss"] < found[0]["soft_loss"]
    assert all(row["loss"] == pytest.approx(row["soft_loss"], rel=1e-5) for row in found)


def test_a_cached_loss_killed_and_resumed_ends_the_same(made, tmp_path):
    folder, common = made
    student = [*common, "job=student", f"cache.dir={folder}/t/cache", "student.loss=reverse_kl",
               "student.loss_options.temperature=2", "student.train.checkpoint_every=3"]  # fmt: skip
    run(*student, f"hydra.run.dir={tmp_path}/s")
    kill_once(tmp_path / "k" / "checkpoints" / "step-00000006", 1, *student, f"hydra.run.dir={tmp_path}/k")
    run(*student, f"hydra.run.dir={tmp_path}/k", "resume=true")
    assert losses(tmp_path / "k") == losses(tmp_path / "s")


def test_the_codec_of_a_cache_is_checked_before_the_data_are_packed(made, tmp_path):
    folder, common = made
    header = (folder / "t" / "cache" / "cache.json").read_text()
    assert json.loads(header)["codec"]["name"] == "topk"
    sampled = [*common, "teacher.train.steps=2", f"hydra.run.dir={tmp_path}/t"]
    run(*sampled, "job=teacher")
    student = [*common, "job=student", f"cache.dir={tmp_path}/t/cache", f"data.dir={tmp_path}/data"]
    for keys, said in (
        (["student.loss=skew_kl"], "student.loss is skew_kl"),
        (["student.loss=forward_kl", "student.loss_options.temperature=2"], "student.loss_options.temperature is 2"),
    ):
        wrong = run(*student, *keys, f"hydra.run.dir={tmp_path}/s", code=2).stderr
        assert f"{said} with the cache in {tmp_path}/t/cache, of codec systematic; it is not linear in p" in wrong
    assert not (tmp_path / "data").exists()


def test_a_frozen_live_teacher_killed_resumed_and_exported(made, tmp_path):
    folder, common = made
    student = [*common, "job=student", "student.targets=live", f"teacher.from={folder}/t",
               "student.loss=jensen_shannon", "student.hidden_match=0.5", "student.train.checkpoint_every=3",
               "student.train.accumulation=2",
               "student.weighting.entropy.enabled=true", "student.weighting.entropy.scale=true"]  # fmt: skip
    run(*student, f"hydra.run.dir={tmp_path}/s")
    kill_once(tmp_path / "k" / "checkpoints" / "step-00000006", 1, *student, f"hydra.run.dir={tmp_path}/k")
    run(*student, f"hydra.run.dir={tmp_path}/k", "resume=true")
    assert losses(tmp_path / "k") == losses(tmp_path / "s")
    found = logged(tmp_path / "s")
    assert [row["hidden_match"] for row in found] == [row["hidden_match"] for row in logged(tmp_path / "k")]
    assert found[-1]["hidden_match"] < found[0]["hidden_match"] and all(row["coverage"] == 1 for row in found)
    assert found[-1]["teacher_loss"] < found[-1]["hard_loss"] and 0 < found[0]["entropy_factor"] <= 1

    run(*student, f"hydra.run.dir={tmp_path}/two", ranks=2)
    for one, two in zip(found, logged(tmp_path / "two"), strict=True):
        for key in ("loss", "soft_loss", "hidden_match", "teacher_loss", "grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=1e-3), key

    run(*common, "job=export", f"init_from={tmp_path}/s", f"export.dir={tmp_path}/hf", "export.drop_router_bias=true",
        f"hydra.run.dir={tmp_path}/e")  # fmt: skip
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        assert file.keys() and not any("projector" in name for name in file.keys())  # noqa: SIM118
    other = [each for each in student if not each.startswith("teacher.from")]
    run(*common, "job=teacher", "teacher.capture=false", "seed=5", f"hydra.run.dir={tmp_path}/t2")
    kill_once(tmp_path / "o" / "checkpoints" / "step-00000003", 1, *student, f"hydra.run.dir={tmp_path}/o")
    wrong = run(*other, f"teacher.from={tmp_path}/t2", f"hydra.run.dir={tmp_path}/o", "resume=true", code=2).stderr
    assert "teacher.from is" in wrong and "was started with" in wrong


def test_any_causal_language_model_teaches_live(made, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder, common = made
    torch.manual_seed(0)
    small = LlamaConfig(vocab_size=272, hidden_size=24, intermediate_size=24, num_hidden_layers=2,
                        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32)  # fmt: skip
    for name, vocab_size in (("hf", 272), ("wide", 280), ("narrow", 271)):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**small.to_dict() | {"vocab_size": vocab_size}))
        model.save_pretrained(tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_text((folder / "t" / "tokenizer.json").read_text())
    student = [*common, "job=student", "student.targets=live", "student.train.steps=4", "student.hidden_match=1",
               "student.loss=reverse_kl"]  # fmt: skip
    run(*student, f"teacher.from=hf:{tmp_path}/hf", f"hydra.run.dir={tmp_path}/s")
    assert len(logged(tmp_path / "s")) == 4
    for name, said in (
        ("wide", "280 ids: allowed is as many"),
        ("narrow", "271 ids: allowed is as many; student.loss"),
    ):
        wrong = run(*student, f"teacher.from=hf:{tmp_path}/{name}", f"hydra.run.dir={tmp_path}/w", code=2).stderr
        assert f"teacher.from=hf:{tmp_path}/{name} has {said}" in wrong and "Traceback" not in wrong


PARTS = ("loss", "soft_loss", "hidden_match", "teacher_loss", "grad_norm", "soft_grad_norm", "effective_weight")


def assert_close(some, others, rel):
    assert len(some) > 1
    for one, other in zip(some, others, strict=True):
        for key in PARTS:
            assert other[key] == pytest.approx(one[key], rel=rel), key


def test_a_learning_live_teacher_in_bf16_under_zero_1(made, tmp_path):
    _, common = made
    live = [*common, "student.targets=live", "student.hidden_match=0.3", "student.loss=skew_kl", "engine=zero1",
            "precision=bf16", "student.loss_options.temperature=2", "student.train.log_every=2",
            "student.train.checkpoint_every=2", "teacher.train.checkpoint_every=2", "job=codistill",
            "teacher.capture=false", "codistill.rounds=2"]  # fmt: skip
    run(*live, f"hydra.run.dir={tmp_path}/one")
    run(*live, f"hydra.run.dir={tmp_path}/two", ranks=2)
    assert_close(logged(tmp_path / "one"), logged(tmp_path / "two"), 0.01)
    kill_once(tmp_path / "k" / "checkpoints" / "step-0000001*", 1, *live, f"hydra.run.dir={tmp_path}/k")
    run(*live, f"hydra.run.dir={tmp_path}/k", "resume=true")
    assert losses(tmp_path / "k") == losses(tmp_path / "one")


@pytest.mark.parametrize("capture", [False, True])
def test_a_learning_live_teacher(made, tmp_path, capture):
    _, common = made
    both = [*common, "job=codistill", "student.targets=live", f"teacher.capture={str(capture).lower()}",
            "codistill.rounds=3", "teacher.train.steps=12", "student.train.steps=12", "student.train.log_every=2",
            "student.train.checkpoint_every=2", "teacher.train.checkpoint_every=2"]  # fmt: skip
    both += ["+codistill.arms={hard:{cached:false},old:{cached:true}}"] if capture else ["student.hidden_match=0.2"]
    run(*both, f"hydra.run.dir={tmp_path}/s")
    found, summary = logged(tmp_path / "s"), json.loads((tmp_path / "s" / "summary.json").read_text())
    # At weights of the moment: its loss falls as it learns, and the student starts when it is half-way.
    assert len(found) == 6 and found[-1]["teacher_loss"] < found[0]["teacher_loss"]
    assert ("bytes_per_token" in summary) == ("old_loss" in summary) == ("hard_loss" in summary) == capture
    assert (tmp_path / "s" / "cache").exists() == capture
    if not capture:
        kill_once(tmp_path / "k" / "checkpoints" / "step-0000001*", 1, *both, f"hydra.run.dir={tmp_path}/k")
        run(*both, f"hydra.run.dir={tmp_path}/k", "resume=true")
        assert losses(tmp_path / "k") == losses(tmp_path / "s")
        run(*both, "engine=zero1", f"hydra.run.dir={tmp_path}/two", ranks=2)
        assert_close(found, logged(tmp_path / "two"), 1e-3)
