"""How many CPU threads a process takes where `engine.threads` is 0."""

import os

import pytest

from distill.engine import dist


@pytest.mark.parametrize(
    "environment, ranks, threads",
    [
        ({}, 1, 6),
        ({}, 2, 3),
        ({}, 12, 1),
        ({"OMP_NUM_THREADS": "4"}, 1, 4),
        ({"OMP_NUM_THREADS": "1"}, 1, 1),
        ({"OMP_NUM_THREADS": "5,2"}, 1, 5),
        ({"OMP_NUM_THREADS": "2", "TORCHELASTIC_RUN_ID": "x"}, 2, 2),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 2, 3),
        ({"OMP_NUM_THREADS": ""}, 1, 6),
        ({"OMP_NUM_THREADS": "many"}, 1, 6),
        ({"OMP_NUM_THREADS": "0"}, 1, 6),
    ],
)
def test_threads_are_the_users_else_a_share_of_the_cores(monkeypatch, environment, ranks, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert dist._threads(ranks) == threads
