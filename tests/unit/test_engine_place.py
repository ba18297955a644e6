"""The place of a process among the others, as a launcher, or its leftovers in a shell, sets it."""

import os

import pytest

from distill.config.errors import ConfigError
from distill.config.schema import EngineConfig
from distill.engine import dist

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    before = {name: os.environ.get(name) for name in NAMES}
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    yield
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


@pytest.mark.parametrize(
    "variables, lines",
    [
        ({"RANK": "abc"}, ["RANK is 'abc' in the environment; a whole number, or unset it for one process"]),
        ({"RANK": "-1"}, ["RANK is '-1' in the environment; a whole number, or unset it for one process"]),
        ({"RANK": "3"}, ["RANK is 3 in the environment; allowed: 0 to 0"]),
        ({"WORLD_SIZE": "0"}, ["WORLD_SIZE is 0 in the environment; allowed: 1 to 1000000"]),
        ({"MASTER_PORT": "99999"}, ["MASTER_PORT is 99999 in the environment; allowed: 0 to 65535"]),
        ({"LOCAL_WORLD_SIZE": "two", "MASTER_PORT": ""}, ["LOCAL_WORLD_SIZE is 'two'", "MASTER_PORT is ''"]),
    ],
)
def test_all_wrong_variables_are_named_at_once(monkeypatch, variables, lines):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        dist.start(EngineConfig(threads=1))
    found = caught.value.problems
    assert len(found) == len(lines) and all(a.startswith(b) for a, b in zip(found, lines, strict=True)), found


def test_a_backend_that_there_is_not_is_named(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    with pytest.raises(ConfigError, match=r"^engine.backend is nope, rank 0 of 1; the processes cannot join: "):
        dist.start(EngineConfig(threads=1, backend="nope"))
