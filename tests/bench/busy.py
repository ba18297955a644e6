"""Tokens a second of the smoke's teacher by how its threads wait: on a quiet machine, and beside another trainer.

GNU OpenMP's threads spin at the end of each parallel region. Where another process holds a core, they spin while the
thread that they wait for has none, so the rate falls to a tenth. All settings are measured in turns beside the same
trainer, which waits as other programs do, by libgomp's default.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

DEFAULT = {"GOMP_SPINCOUNT": "300000"}
"""libgomp's own."""
SETTINGS = {
    "default": DEFAULT,
    "ours": {},
    **{f"spin_{count}": {"GOMP_SPINCOUNT": str(count)} for count in (10_000, 5_000, 3_000, 2_000, 1_000)},
    "one_thread": {**DEFAULT, "OMP_NUM_THREADS": "1"},
}
SECONDS, ROUNDS = 6.0, 2


def _start(folder: Path, setting: dict[str, str]) -> subprocess.Popen[bytes]:
    own = ("GOMP_SPINCOUNT", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
    arguments = ["job=teacher", "experiment=smoke", "teacher.train.steps=100000", "teacher.train.eval_every=0"]
    arguments += ["tracking=off", f"hydra.run.dir={folder}", f"data.dir={folder.parent / 'data'}"]
    return subprocess.Popen(
        [sys.executable, "-m", "distill", *arguments],
        env={k: v for k, v in os.environ.items() if k not in own} | setting,
        stdout=subprocess.DEVNULL,
    )


def _rows(folder: Path) -> list[float]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["tokens_per_second"] for line in lines if line.endswith("}")]


def _rate(folder: Path, setting: dict[str, str]) -> float:
    """Median tokens a second of the rows that follow the first one within SECONDS, at least three rows."""
    process = _start(folder, setting)
    try:
        deadline = None
        while deadline is None or time.monotonic() < deadline or len(_rows(folder)) < 4:
            assert process.poll() is None, f"the trainer ended with {process.returncode}"
            if deadline is None and _rows(folder):
                deadline = time.monotonic() + SECONDS
            time.sleep(0.2)
        return statistics.median(_rows(folder)[1:])
    finally:
        process.kill()
        process.wait()


def _in_turns(place: str, root: Path) -> dict[str, float]:
    rates = defaultdict(list)
    for turn, (name, setting) in itertools.product(range(ROUNDS), SETTINGS.items()):
        rate = _rate(root / f"{place}-{name}-{turn}", setting)
        print(f"{place:>6}  {name:<10}  {rate:>9,.0f} tokens/s", flush=True)
        rates[name].append(rate)
    medians = {f"{place}_{name}": statistics.median(values) for name, values in rates.items()}
    for name, values in rates.items():
        medians[f"{place}_{name}_of_default"] = statistics.median(a / b for a, b in zip(values, rates["default"]))
    return medians


def run() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        results = _in_turns("quiet", root)
        other = _start(root / "other", DEFAULT)
        try:
            return results | _in_turns("beside", root)
        finally:
            other.kill()
            other.wait()
