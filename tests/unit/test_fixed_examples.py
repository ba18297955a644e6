"""`make test` draws the same on every machine; `make fuzz` draws anew, and says how to draw the same again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli import environment

ROOT = Path(__file__).parents[2]


def examples(*modules, **variables):
    command = [sys.executable, "-m", "tests.workers.examples", *modules]
    return json.loads(subprocess.run(command, env=environment(**variables), capture_output=True, check=True).stdout)


def test_examples_depend_on_nothing_but_the_test():
    found = examples(PYTHONHASHSEED="1")
    assert len(found) == 2 * 100 + 3
    assert found == examples("distill.run.run", "distill.__main__", PYTHONHASHSEED="2", CI="true")


PLANTED = """
import random
import pytest
from hypothesis import given, strategies as st

@pytest.mark.parametrize("seed", range(3))
def test_of_a_seed(seed):
    assert random.Random(seed).random() < 0.7

@given(st.integers(0, 1000))
def test_of_hypothesis(n):
    assert n != 777

def test_that_draws_nothing():
    assert False
"""


def search(folder, seed, name):
    (folder / "conftest.py").write_text("from tests.conftest import *")
    (folder / "test_planted.py").write_text(PLANTED)
    command = [sys.executable, "-m", "tests.fuzz", "--minutes", "2", "--seed", seed, "--only", name]
    done = subprocess.run(command, cwd=folder, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["test_of_a_seed", "test_of_hypothesis"])
def test_search_finds_what_is_rare_and_finds_it_again(tmp_path, name):
    code, said = search(tmp_path, "0", name)
    assert code == 1 and f"FAILED test_planted.py::{name}" in said, said
    (again,) = (line.split() for line in said.splitlines() if line.startswith("Again: make fuzz"))
    code, said = search(tmp_path, again[3].removeprefix("SEED="), again[4].removeprefix("ONLY="))
    assert code == 1 and "in 1 rounds" in said, said
    assert name == "test_of_a_seed" or ("n=777" in said and "@reproduce_failure" in said), said


def test_search_for_a_name_that_nothing_has(tmp_path):
    code, said = search(tmp_path, "0", "draws_nothing")
    assert code == 2 and "ONLY is draws_nothing; no test that draws its input has this name" in said
