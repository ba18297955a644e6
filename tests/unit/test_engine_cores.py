"""How threads wait follows what other programs do at the start, and what the user says goes before."""

import os
import subprocess
import sys

import psutil
import pytest

import distill
from distill.engine import cores


@pytest.mark.parametrize(
    "percent, environment, threads, spins",
    [
        ([10.0, 20.0, 5.0, 5.0], {}, 0, distill.SPINS),
        ([90.0, 20.0, 5.0, 5.0], {}, 0, "1000"),
        ([0.0, 0.0, 100.0, 100.0], {}, 0, distill.SPINS),  # on cores of others
        ([100.0, 100.0, 0.0, 0.0], {}, 1, distill.SPINS),
        ([100.0, 100.0, 0.0, 0.0], {"OMP_NUM_THREADS": "1"}, 0, distill.SPINS),
        ([100.0, 100.0, 0.0, 0.0], {"OMP_NUM_THREADS": "1"}, 2, "1000"),
        ([100.0, 100.0, 0.0, 0.0], {"GOMP_SPINCOUNT": "7"}, 0, "7"),
    ],
)
def test_spins(monkeypatch, percent, environment, threads, spins):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(psutil, "cpu_percent", lambda seconds, percpu: percent)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", distill.SPINS)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    told = cores.settle(threads)
    assert os.environ["GOMP_SPINCOUNT"] == spins
    assert (told is not None and "of 2 cores" in told) == (spins == "1000")


@pytest.mark.parametrize(
    "environment, spins",
    [({}, distill.SPINS), ({"GOMP_SPINCOUNT": "9"}, "9"), ({"OMP_WAIT_POLICY": "passive"}, None)],
)
def test_what_the_user_has_set_stays(environment, spins):
    own = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", "import distill, os; print(os.environ.get('GOMP_SPINCOUNT'))"],
        env=own | environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(spins)
