"""Half a student through the command line: what is frozen keeps every bit, the router bias with it; resume works."""

import shutil
from types import SimpleNamespace

import torch
from omegaconf import OmegaConf

from distill.config.schema import (
    ArmConfig,
    Freeze,
    ModelConfig,
    RunConfig,
    StudentConfig,
    TrainConfig,
    VisionConfig,
)
from distill.engine.checkpoint import Checkpoint
from distill.engine.optim import decay_group
from distill.model import Transformer
from distill.run.codistill import arm_config
from tests.cli import TINY, losses, run, write_corpus

VISION = [
    "vision@student.model.vision=tiny",
    *(f"student.model.vision.{key}={value}" for key, value in dict(
        hidden_size=8, layers=1, heads=1, mlp_hidden=32, adapter_hidden=8, adapter_out=8, image_token_id=271).items()),
]  # fmt: skip


def test_a_frozen_text_model_keeps_every_bit_and_a_run_resumes(tmp_path):
    arguments = [
        *TINY, *VISION, write_corpus(tmp_path), "job=student", "student.cached=false", "student.train.freeze=text",
        "student.train.steps=4", "student.train.checkpoint_every=2", "student.train.keep_checkpoints=2",
        "engine=zero1", f"data.dir={tmp_path}/data",
    ]  # fmt: skip
    run(*arguments, f"hydra.run.dir={tmp_path}/whole")
    found = Checkpoint(tmp_path / "whole" / "checkpoints" / "step-00000004")
    tensors, config = found.tensors("student"), found.state["models"]["student"]
    torch.manual_seed(1)  # a student's, seed 0
    start = Transformer(OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), config)))
    for name, tensor in start.state_dict().items():
        kind = "buffer" if name.endswith("router.bias") else "param"
        same = torch.equal(tensors[f"{kind}/{name}"], tensor)
        # Without images vision's gradient is zero, but weight decay moves its matrices.
        vision = name.startswith(("vision_model.", "multi_modal_projector."))
        assert same != (vision and decay_group(name) == "matrices"), name

    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000004")
    (tmp_path / "cut" / "summary.json").unlink()
    run(*arguments, f"hydra.run.dir={tmp_path}/cut", "resume=true")
    again = Checkpoint(tmp_path / "cut" / "checkpoints" / "step-00000004").tensors("student")
    assert again.keys() == tensors.keys() and all(torch.equal(again[n], t) for n, t in tensors.items())
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_an_arm_freezes_what_its_student_does(tmp_path):
    vision = VisionConfig()
    part = StudentConfig(train=TrainConfig(freeze=Freeze.vision), model=ModelConfig(vision=vision))
    here = SimpleNamespace(config=RunConfig(job="codistill", student=part), folder=tmp_path)
    arm = arm_config(here, ArmConfig(cached=False)).student
    assert arm.train.freeze is Freeze.vision and arm.model.vision is vision
