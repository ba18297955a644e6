"""Does alpha depend on what it must not depend on, and does a student lose by targets in the teacher's own order?

`alpha_over_shard_size`: greatest difference of a step's mean alpha between caches of 4, 64 and 256 samples a shard;
`alpha_over_pauses`: between students that follow a live teacher, both stopped and let go at random, and one undisturbed
run; `alpha_live_over_finished`: between a follower and a student on the finished cache, who knows where the teacher
ends: it is reported, not bounded. `own_order_*`: PAIRS students (environment, 8) in the teacher's order less labels
alone, by seed of init and data, on a made-up language: mean, upper end of the 95 % t
interval, nats, and the mean alpha of the students.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

from distill.run.intervals import interval
from tests import cli
from tests.cli import PATIENCE, TINY, command, environment, rows, write_corpus

CONF = Path(__file__).parent / "conf"
STEPS = ["teacher.train.steps=60", "student.train.steps=60", "weighting@student.weighting=lag"]


def run() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = [write_corpus(folder / "text", documents=60), f"data.dir={folder}/packed", *TINY, *STEPS]
        found = over_shards(folder, data, (4, 64, 256)) | over_pauses(folder, data, seeds=range(3))
        return found | own_order(folder / "own", int(os.environ.get("PAIRS", "8")))


def alphas(folder: Path) -> np.ndarray:
    found = [row["alpha"] for row in rows(folder) if row["job"] == "student" and "alpha" in row]
    assert len(found) == 30 and 0.05 < np.mean(found) < 0.94 and np.std(found) > 0.01, found
    return np.array(found)


def over_shards(folder: Path, data: list[str], sizes: tuple[int, ...]) -> dict[str, float]:
    found = []
    for size in sizes:
        cli.run(*data, "job=teacher", f"cache.shard_samples={size}", f"hydra.run.dir={folder}/t{size}")
        cli.run(*data, "job=student", f"cache.dir={folder}/t{size}/cache", f"hydra.run.dir={folder}/s{size}")
        found.append(alphas(folder / f"s{size}"))
    return {"alpha_over_shard_size": max(float(np.abs(part - found[0]).max()) for part in found)}


def over_pauses(folder: Path, data: list[str], seeds: range) -> dict[str, float]:
    """The first seed's pair of teacher and student is left alone."""
    found = [followed(folder / f"live{seed}", data, seed, pauses=seed > 0) for seed in seeds]
    cli.run(*data, "job=student", f"cache.dir={folder}/live0/t/cache", f"hydra.run.dir={folder}/finished")
    return {
        "alpha_over_pauses": max(float(np.abs(part - found[0]).max()) for part in found),
        "alpha_live_over_finished": float(np.abs(alphas(folder / "finished") - found[0]).max()),
    }


def followed(folder: Path, data: list[str], seed: int, pauses: bool) -> np.ndarray:
    """Alphas of a student that follows a teacher in training."""
    rng = random.Random(seed)
    follow = ["job=student", "cache.follow=true", f"cache.dir={folder}/t/cache", f"hydra.run.dir={folder}/s"]
    jobs = [["job=teacher", "cache.shard_samples=8", f"hydra.run.dir={folder}/t"], follow]
    processes = [
        subprocess.Popen(command(*data, *job), env=environment(), stdout=subprocess.DEVNULL, start_new_session=True)
        for job in jobs
    ]
    deadline = time.monotonic() + PATIENCE
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(rng.uniform(0.05, 0.4))
        running = [process for process in processes if process.poll() is None]
        if pauses and running:
            stopped = rng.choice(running)
            os.killpg(stopped.pid, signal.SIGSTOP)
            time.sleep(rng.uniform(0.05, 0.8))
            os.killpg(stopped.pid, signal.SIGCONT)
    assert [process.wait(timeout=1) for process in processes] == [0, 0]
    return alphas(folder / "s")


def own_order(folder: Path, pairs: int) -> dict[str, float]:
    """In rounds with a teacher that learns, and on its finished cache."""
    found: dict[str, list[float]] = {"live": [], "finished": []}
    alpha: dict[str, list[float]] = {"live": [], "finished": []}
    for seed in range(pairs):
        common = [
            "--config-dir",
            str(CONF),
            "experiment=own_order",
            f"seed={seed}",
            "tracking=off",
            f"data.dir={folder}/data{seed}",
        ]
        live, finished = folder / f"live{seed}", folder / f"finished{seed}"
        cli.run(*common, "job=codistill", f"hydra.run.dir={live}")
        cli.run(*common, "job=student", f"cache.dir={live}/cache", f"hydra.run.dir={finished}")
        summary = json.loads((live / "summary.json").read_text())
        losses = {"live": summary["distilled_loss"]}
        losses["finished"] = json.loads((finished / "summary.json").read_text())["student_loss"]
        for name, place in (("live", live), ("finished", finished)):
            found[name].append(losses[name] - summary["hard_loss"])
            logged = [row["alpha"] for row in rows(place) if row["job"] == "student" and "alpha" in row]
            alpha[name].append(float(np.mean(logged)))
    results = {}
    for name, differences in found.items():
        found_in = interval(differences)
        results[f"own_order_{name}_minus_labels"] = found_in.mean
        results[f"own_order_{name}_minus_labels_high"] = found_in.high
        results[f"own_order_{name}_alpha"] = float(np.mean(alpha[name]))
    return results
