"""Compiled functions where their machine code can be kept, and where it cannot: the same result, and not a word."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import distill
from tests.cli import environment

ROOT = str(Path(distill.__file__).parents[1])
PROGRAM = """
import numpy as np
from distill.cache.jit import compiled

@compiled
def triple(values_N):
    total = 0
    for n in range(len(values_N)):
        total += 3 * values_N[n]
    return total

if __name__ == "__main__":
    print(triple(np.arange(5)), len(triple.stats.cache_hits), triple.stats.cache_path)
"""


@pytest.fixture
def program(tmp_path):
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "program.py").write_text(PROGRAM)
    return tmp_path / "installed" / "program.py"


def start(program, **variables):
    """Its hits and its place, of a process that may not even warn."""
    env = {k: v for k, v in environment().items() if k not in ("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR")}
    env |= {"PYTHONPATH": ROOT} | variables
    done = subprocess.run(
        [sys.executable, "-W", "error", program],
        cwd=program.parent,
        env=env,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    total, hits, place = done.stdout.split()
    assert total == "30"
    return int(hits), place


def read_only(program):
    """Nothing can be made in a folder that is a file, not even by root."""
    (program.parent / "__pycache__").touch()


def test_beside_the_module_where_that_can_be_written(program, tmp_path):
    place = str(program.parent / "__pycache__")
    assert start(program, HOME=str(tmp_path / "home")) == (0, place)
    assert start(program, HOME=str(tmp_path / "home")) == (1, place)
    assert not (tmp_path / "home").exists()


def test_a_read_only_installation_keeps_in_the_users_cache_folder(program, tmp_path):
    read_only(program)
    for hits in (0, 1):
        found, place = start(program, HOME=str(tmp_path / "home"))
        assert found == hits and place.startswith(str(tmp_path / "home" / ".cache"))


def test_nothing_is_kept_where_nothing_can_be_written(program):
    read_only(program)
    for variables in ({"HOME": "/dev/null"}, {"HOME": "/dev/null", "NUMBA_CACHE_DIR": "/dev/null/numba"}):
        assert start(program, **variables) == (0, "None")


def test_a_home_that_is_unknown_is_no_folder_named_tilde(program, monkeypatch):
    read_only(program)
    (program.parent / "sitecustomize.py").write_text("import os\nos.path.expanduser = lambda path: path\n")
    assert start(program, PYTHONPATH=f"{program.parent}{os.pathsep}{ROOT}") == (0, "None")
    assert not (program.parent / "~").exists()


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
def test_damaged_machine_code_is_compiled_anew(program, suffix):
    _, place = start(program, HOME="/dev/null")
    (kept,) = (each for each in os.scandir(place) if each.name.endswith(suffix))
    with open(kept.path, "wb") as file:
        file.write(b"\x80\x05cut")
    assert start(program, HOME="/dev/null")[0] == 0
    assert start(program, HOME="/dev/null")[0] == 1


def test_a_full_disk_keeps_nothing(program):
    full = PROGRAM.replace(
        "if __name__",
        "from numba.core.caching import IndexDataCacheFile\n\ndef full(*_):\n    raise OSError(28, 'No space')\n\n"
        "IndexDataCacheFile._save_data = full\n\nif __name__",
    )
    program.write_text(full)
    for _ in range(2):
        assert start(program, HOME="/dev/null")[0] == 0
