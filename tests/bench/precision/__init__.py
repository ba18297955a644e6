"""What a precision costs: losses of students trained in fp32, bf16 and fp8 from equal weights on equal samples.

`<precision>_minus_fp32_nats` with `_low` and `_high`: held-out loss less that of fp32, mean and 95 % t interval over
the pairs of all seeds and widths; `<precision>_minus_fp32_high_share`: its upper end over fp32's loss, which is to be
below 0.005. `<precision>_target_error` and `codec_target_error`: mean squared distance, a token, from the distributions
of models trained in fp32, of those that the same weights give in a precision, and of what the default codec stores.

One line a student in docs/evidence/precision.jsonl, found again by configuration and sources, so the same command goes
on after any end; all of them take half an hour on 2 cores. In the environment SEEDS is how many (6), STALE=keep takes
lines of other sources. On a CPU both precisions are emulated.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from distill.config.load import resolve
from distill.config.registry import PRECISIONS
from distill.config.schema import PrecisionConfig, RunConfig
from distill.config.study import LabArm, LabTargets
from distill.engine import dist as engine_dist
from distill.engine.deepspeed_engine import load_weights
from distill.model import Transformer
from distill.model.parts import Parts
from distill.model.precision import numerics_of
from distill.run import build
from distill.run.evaluation import held_out
from distill.run.evidence import Evidence, Line, config_digest, sources_digest
from distill.run.intervals import interval
from distill.run.lab_student import held_out_measures
from distill.run.run import Run
from distill.run.trainer import to_checkpoints, train
from tests.bench._codec_meter import CodecMeter, CodecSetting

FILE = Path("docs/evidence/precision.jsonl")
FOLDER = Path("runs/bench/precision")
FP32, LOW = "fp32", ("bf16", "fp8")
WIDTHS = {96: 2.2e-3, 192: 1.1e-3}
"""Learning rate by width."""
COMMON = [
    "job=student", "experiment=smoke", "student.cached=false", "student.replay.order=own", "engine=zero0",
    "student.optim.schedule=linear", "student.train.batch=8", "student.train.steps=600", "student.train.eval_every=0",
    "student.train.checkpoint_every=600", "student.train.log_every=50", "tracking=off", "tracking.report=false",
    "tracking.console=off", "evaluate.samples=512", f"data.dir={FOLDER}/data",
]  # fmt: skip
TARGET_SAMPLES = 32
GOAL = 0.005
"""Share of fp32's loss that the upper end of fp8's interval is to stay below."""


def run() -> dict[str, float]:
    evidence, seeds = Evidence(FILE), range(int(os.environ.get("SEEDS", "6")))
    names = [FP32, *(name for name in LOW if name in PRECISIONS.names)]
    evidence.refresh()
    lines = {}
    for seed in seeds:
        for width in WIDTHS:
            for name in names:
                lines[seed, width, name] = _line(evidence, seed, width, name)
    return figures(lines, seeds, names)


def config_of(seed: int, width: int, name: str) -> RunConfig:
    sizes = {"hidden_size": width, "head_dim": width // 4, "expert_hidden": width, "dense_hidden": 2 * width}
    own = [f"student.model.{key}={value}" for key, value in sizes.items()]
    return resolve([*COMMON, *own, f"student.optim.lr={WIDTHS[width]}", f"seed={seed}", f"precision={name}"])


def key_of(config: RunConfig) -> dict[str, str]:
    return {
        "config": config_digest(config, [], [], LabArm(), LabTargets.captured),
        "sources": sources_digest("labels"),
    }


def _line(evidence: Evidence, seed: int, width: int, name: str) -> Line:
    config = config_of(seed, width, name)
    key = key_of(config)
    found = evidence.find(key["config"], None if os.environ.get("STALE") == "keep" else key["sources"])
    if found is None:
        line = {"width": width, "precision": name, "seed": seed, **_student(config), **key}
        print(f"width {width}, seed {seed}, {name}: {line['loss']:.4f} nats, {line['seconds']:.0f} s", flush=True)
        evidence.append(line)
        evidence.refresh()
        found = line
    return found


def _student(config: RunConfig) -> Line:
    began, folder = time.process_time(), FOLDER / "student"
    shutil.rmtree(folder, ignore_errors=True)
    ranks = engine_dist.start(config.engine)
    with Run(config, folder, ranks) as student:
        build.prepare(student)
        trainer, _ = build.student(student, None)
        train(student, {"student": trainer}, lambda _: to_checkpoints(trainer, save_last=False))
        measures = held_out_measures(student, trainer.engine.model)
        measures["tokens"] = trainer.steps * trainer.clock.tokens_per_step
        if config.precision.name == FP32:
            measures["target_errors"] = target_errors(student, trainer.engine.model)
        trainer.engine.close()
    shutil.rmtree(folder)
    return {**measures, "seconds": time.process_time() - began}


@torch.no_grad()
def target_errors(run: Run, model: Transformer) -> dict[str, float]:
    """Of what a model in fp32 predicts on held-out samples, by precision and of the codec."""
    batches = list(held_out(run, TARGET_SAMPLES, TARGET_SAMPLES))
    want = torch.cat([_log_probabilities(model, batch) for batch in batches])
    codec = run.config.cache.codec
    meter = CodecMeter(CodecSetting(codec.name, codec.draws), 0, run.config.data.sample_tokens, want.shape[1])
    meter.add(want.double().exp(), want, want.argmax(-1))
    errors = {"codec": meter.error}
    for name in LOW:
        if name in PRECISIONS.names:
            numerics = numerics_of(PrecisionConfig(name), run.dist.device)
            low = Transformer(model.config, Parts.of(numerics))
            load_weights(low, {f"param/{key}": value for key, value in model.state_dict().items()})
            low.to(run.dist.device, numerics.dtype)
            found = torch.cat([_log_probabilities(low, batch) for batch in batches])
            errors[name] = (found.double().exp() - want.double().exp()).square().sum(1).mean().item()
    return errors


def _log_probabilities(model: Transformer, batch: Any) -> torch.Tensor:
    """[T, V], fp32; the head's products are summed in fp32 in every precision."""
    logits_TV, _ = model(batch.ids_BS, batch.documents_BS, lambda h_TD, w_VD: h_TD.float() @ w_VD.float().T)
    return logits_TV.log_softmax(-1)


def figures(lines: dict[tuple[int, int, str], Line], seeds: range, names: list[str]) -> dict[str, float]:
    """Of lines by (seed, width, precision)."""
    pairs = [(seed, width) for seed in seeds for width in WIDTHS]
    found: dict[str, float] = {}
    base = sum(lines[*pair, FP32]["loss"] for pair in pairs) / len(pairs)
    for name in names[1:]:
        differences = {pair: lines[*pair, name]["loss"] - lines[*pair, FP32]["loss"] for pair in pairs}
        for width in WIDTHS:
            own = [difference for pair, difference in differences.items() if pair[1] == width]
            found[f"{name}_minus_fp32_nats_width_{width}"] = interval(own).mean
        all_pairs = interval(list(differences.values()))
        key = f"{name}_minus_fp32_nats"
        found |= {key: all_pairs.mean, f"{key}_low": all_pairs.low, f"{key}_high": all_pairs.high}
        found[f"{name}_minus_fp32_high_share"] = all_pairs.high / base
        verdict = all_pairs.verdict(GOAL * base)
        print(f"{name}: less than {GOAL:.1%} of fp32's loss above it: {verdict}", flush=True)
    for name in ("codec", *names[1:]):
        errors = [lines[*pair, FP32]["target_errors"].get(name) for pair in pairs]
        if None not in errors:
            found[f"{name}_target_error"] = sum(errors) / len(errors)
    return found | {"fp32_nats": base, "pairs": float(len(pairs))}
