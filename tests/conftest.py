"""What holds for every test: examples and random numbers are the same on every machine and in any order of tests.

Random search is a command of its own: `make fuzz`.
"""

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, register_random, settings
from hypothesis.internal.conjecture import providers

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined

settings.register_profile(
    "fixed",
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
settings.load_profile("fixed")
# Hypothesis mixes the constants of all modules loaded so far into what it draws: other tests, other examples.
if hasattr(providers, "_get_local_constants"):
    providers._get_local_constants = providers.Constants


class _Torch:
    """Torch's generator, which hypothesis seeds before each example as it does those of random and numpy."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_torch = _Torch()
register_random(_torch)


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup() -> None:
    _seed()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    _seed()


def pytest_make_parametrize_id(val, argname):
    """Of bytes the argument's name and place: what gzip makes holds the time, and the processes of one run must find
    tests of the same names."""
    return argname if isinstance(val, bytes) else None
