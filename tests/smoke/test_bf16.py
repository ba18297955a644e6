"""The main job in bf16 at ZeRO 0, killed, resumed and evaluated in two precisions; the bench of precisions in short."""

import json
import os
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open

from tests.cli import PATIENCE, TINY, environment, kill_once, losses, run, write_corpus


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bf16")
    return [*TINY, write_corpus(folder / "main"), f"data.dir={folder}/data", "tracking.report=false", "precision=bf16"]


def test_the_main_job_in_bf16_is_killed_and_resumed_to_the_same_losses(common, tmp_path):
    steps = [f"{role}.train.{key}" for role in ("teacher", "student") for key in ("steps=8", "checkpoint_every=4")]
    job = [*common, *steps, "job=codistill", "codistill.rounds=2"]
    run(*job, f"hydra.run.dir={tmp_path}/whole")
    kill_once(tmp_path / "killed" / "checkpoints" / "step-0000001*", 1, *job, f"hydra.run.dir={tmp_path}/killed")
    # The run keeps its precision, whatever the default means here.
    run(*job, "precision=auto", f"hydra.run.dir={tmp_path}/killed", "resume=true")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert OmegaConf.load(tmp_path / "killed" / "config.yaml").precision.name == "bf16"
    last = max((tmp_path / "whole" / "checkpoints").glob("step-*"))
    for path in last.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            weights = [key for key in sorted(file.keys()) if "param/" in key or "exp_avg" in key]
            assert all(file.get_tensor(key).dtype == torch.float32 for key in weights), path
    for precision in ("fp32", "bf16"):
        run(*common, "job=evaluate", f"precision={precision}", f"init_from={tmp_path}/whole",
            f"hydra.run.dir={tmp_path}/{precision}")  # fmt: skip
    found = [json.loads((tmp_path / name / "summary.json").read_text())["heldout_loss"] for name in ("fp32", "bf16")]
    assert found[0] != found[1] and found[0] == pytest.approx(found[1], rel=2e-3)


SHORT = """
import sys
from pathlib import Path
from tests.bench import precision
precision.FILE, precision.FOLDER = Path(sys.argv[1]) / "lines.jsonl", Path(sys.argv[1]) / "runs"
precision.WIDTHS, precision.COMMON, precision.TARGET_SAMPLES = {64: 1e-2, 128: 1e-2}, sys.argv[2:], 4
first = precision.run()
precision._student = None  # every line is found again
assert precision.run() == first
import json
print(json.dumps(first))
"""


def test_the_bench_in_short_finds_its_lines_again(common, tmp_path):
    own = ["job=student", "student.cached=false", "student.replay.order=own", "student.train.steps=6"]
    plain = [text for text in common if text != "precision=bf16" and not text.startswith("student.model.hidden")]
    command = [sys.executable, "-c", SHORT, str(tmp_path), *plain, *own, "tracking.console=off"]
    done = subprocess.run(
        command, env=environment(SEEDS="2"), cwd=os.getcwd(), capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    names = sorted({line["precision"] for line in lines})
    assert len(lines) == 2 * 2 * len(names) and names == ["bf16", "fp32", "fp8"]
    for name in set(names) - {"fp32"}:
        key = f"{name}_minus_fp32_nats"
        assert found[f"{key}_low"] < found[key] < found[f"{key}_high"]
        assert 0 < found[f"{name}_target_error"] < found["codec_target_error"]
    assert found["bf16_target_error"] < 1e-4 and found["pairs"] == 4
