"""Does the best learning rate of a narrow model fit a wide one? The teacher's own steps, as `job=teacher` trains them.

WIDTHS x a grid of learning rates in factors of 2 x SEEDS, under both parametrizations, STEPS steps of 512 tokens of the
standard library's source each (2 MoE layers, 4 experts, AdamW, linear decay). Judged on held-out text. The optimum of a
width is the vertex of the parabola through the best rate and its neighbors, over log learning rate, of the mean over
seeds; `optimum_ratio_*` is the largest optimum of the three widths over the smallest. Goal: at most 2 under `transfer`.
At the smallest width, the base, both parametrizations are one and are trained once.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from hydra import compose, initialize_config_dir

from distill.config.load import CONF, load
from distill.config.schema import EngineConfig, Parametrization, RunConfig
from distill.data.prepare import prepare
from distill.engine import dist as engine_dist
from distill.run import build
from distill.run.evaluation import evaluate_whole
from distill.run.run import Run
from distill.tracking import charts
from tests.bench._chart import draw

WIDTHS, SEEDS, STEPS = (64, 128, 256), (0, 1), 400
RATES = tuple(2.0**-power for power in range(11, 5, -1))


class Trial(NamedTuple):
    parametrization: str
    width: int
    rate: float
    seed: int


def settings(trial: Trial, folder: Path) -> RunConfig:
    width = trial.width
    sizes = {
        "hidden_size": width,
        "layers": 2,
        "heads": width // 16,
        "kv_heads": width // 32,
        "head_dim": 16,
        "expert_hidden": width,
        "dense_hidden": 2 * width,
        "experts": 4,
        "nope_step": 2,
        "parametrization": trial.parametrization,
        "base.hidden_size": WIDTHS[0],
        "base.layers": 2,
        "base.expert_hidden": WIDTHS[0],
        "base.dense_hidden": 2 * WIDTHS[0],
    }
    overrides = [
        "job=teacher",
        f"seed={trial.seed}",
        f"data.dir={folder / 'data'}",
        "teacher.capture=false",
        *(f"teacher.model.{key}={value}" for key, value in sizes.items()),
        f"teacher.optim.lr={trial.rate}",
        "teacher.optim.schedule=linear",
        f"teacher.train.steps={STEPS}",
        "teacher.train.batch=4",
        "evaluate.samples=128",
        "engine.threads=1",
        "tracking=off",
        "tracking.console=off",
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return load(compose("config", overrides=overrides))


def train(trial: Trial, folder: Path) -> float:
    """Held-out loss in nats per token; one process trains many."""
    run = Run(settings(trial, folder), folder / "-".join(map(str, trial)), engine_dist.start(EngineConfig(threads=1)))
    build.prepare(run)
    trainer, _ = build.teacher(run)
    trainer.advance(trainer.steps)
    loss = evaluate_whole(run, trainer.engine.model).loss
    trainer.engine.close()
    run.tracker.close()
    return loss


def optimum(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Vertex of the parabola through the least loss and its neighbors; an end of the grid is taken as it is."""
    at = int(np.argmin(losses))
    if at in (0, len(rates) - 1):
        return rates[at]
    a, b, _ = np.polyfit(np.log(rates[at - 1 : at + 2]), losses[at - 1 : at + 2], 2)
    return float(np.exp(-b / (2 * a)))


def run() -> dict[str, float]:
    began = time.perf_counter()
    names = [p.value for p in Parametrization]
    # Long ones first, so that no core idles at the end.
    trials = [
        Trial(*values)
        for width in reversed(WIDTHS)
        for values in product(names if width > WIDTHS[0] else names[:1], (width,), RATES, SEEDS)
    ]
    loss_of: dict[Trial, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = settings(trials[0], folder)
        prepare(config.data, folder / "data", config.teacher.model.vocab_size)
        # Spawned, since a forked DeepSpeed hangs.
        with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
            running = {pool.submit(train, trial, folder): trial for trial in trials}
            for done in as_completed(running):
                trial = running[done]
                loss_of[trial] = done.result()
                label = f"{trial.parametrization} width {trial.width} lr {trial.rate:.2g} seed {trial.seed}"
                progress = f"{len(loss_of)}/{len(trials)}  {time.perf_counter() - began:.0f} s"
                print(f"{progress}  {label}: {loss_of[trial]:.4f}", file=sys.stderr, flush=True)
    means = {
        (name, width): [
            float(
                np.mean([loss_of[Trial(name if width > WIDTHS[0] else names[0], width, rate, seed)] for seed in SEEDS])
            )
            for rate in RATES
        ]
        for name, width in product(names, WIDTHS)
    }
    optima = {key: optimum(RATES, losses) for key, losses in means.items()}
    of_names = {name: [optima[name, width] for width in WIDTHS] for name in names}
    _draw(means, of_names)
    return {
        **{f"optimum_ratio_{name}": max(values) / min(values) for name, values in of_names.items()},
        **{f"optimum_{name}_{width}": value for (name, width), value in optima.items()},
        **{f"best_loss_{name}_{width}": min(losses) for (name, width), losses in means.items()},
        **{
            f"loss_{name}_{width}_{rate:.2g}": loss
            for (name, width), losses in means.items()
            for rate, loss in zip(RATES, losses, strict=True)
        },
        "seconds": time.perf_counter() - began,
    }


def _draw(means: dict[tuple[str, int], list[float]], of_names: dict[str, list[float]]) -> None:
    body = ""
    for name, optima in of_names.items():
        curves = [
            charts.Curve(f"width {width}", style, np.array(RATES), np.array(means[name, width]))
            for style, width in enumerate(WIDTHS, 1)
        ]
        best = ", ".join(f"{value:.2g}" for value in optima)
        note = f"Best at {best}: a factor of {max(optima) / min(optima):.2f}."
        frame = charts.Frame(name, "held-out loss, nats per token", "learning rate", note)
        body += charts.line_chart(frame, curves, smoothed=False, zero=False, log_x=True)
    draw("lr_transfer", "Learning rates over widths", f'<div class="grid">\n{body}</div>\n')
