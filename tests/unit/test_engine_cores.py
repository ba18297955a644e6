"""How threads wait follows what other programs do at the start, and what the user sets goes before."""

import os
import subprocess
import sys

import psutil
import pytest

import distill
from distill.engine import cores

OURS = "5000"


@pytest.mark.parametrize(
    "percent, environment, threads, spins",
    [
        ([10.0, 20.0, 5.0, 5.0], {}, 0, OURS),
        ([90.0, 20.0, 5.0, 5.0], {}, 0, "1000"),
        ([0.0, 0.0, 100.0, 100.0], {}, 0, OURS),  # on cores of others
        ([100.0, 100.0, 0.0, 0.0], {}, 1, OURS),
        ([100.0, 100.0, 0.0, 0.0], {"OMP_NUM_THREADS": "1"}, 0, OURS),
        ([100.0, 100.0, 0.0, 0.0], {"OMP_NUM_THREADS": "1"}, 2, "1000"),
        ([100.0, 100.0, 0.0, 0.0], {"GOMP_SPINCOUNT": OURS}, 0, OURS),  # the user's, though it is the same
    ],
)
def test_spins(monkeypatch, percent, environment, threads, spins):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(psutil, "cpu_percent", lambda seconds, percpu: percent)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", OURS)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distill, "OWN_SPINS", "GOMP_SPINCOUNT" not in environment)
    message = cores.settle(threads)
    assert os.environ["GOMP_SPINCOUNT"] == spins
    assert (message is not None and "of 2 cores" in message) == (spins == "1000")


@pytest.mark.parametrize(
    "environment, spins",
    [({}, OURS), ({"GOMP_SPINCOUNT": OURS}, OURS), ({"OMP_WAIT_POLICY": "passive"}, None)],
)
def test_what_the_user_has_set_stays(environment, spins):
    own = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", "import distill, os; print(os.environ.get('GOMP_SPINCOUNT'))"],
        env=own | environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(spins)
