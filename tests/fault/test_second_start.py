"""A second start in the folder of a live run exits with 2, names the owner and changes nothing."""

import os
import subprocess
import time

import pytest

from distill.config import owner
from tests.cli import PATIENCE, TINY, command, environment, run, write_corpus
from tests.unit.test_config_owner import snapshot


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A run that waits for a cache that never comes, and its command without the folder."""
    folder = tmp_path_factory.mktemp("live")
    corpus = write_corpus(folder)
    arguments = [*TINY, corpus, f"data.dir={folder}/packed", "job=student", "cache.follow=true",
                 f"cache.dir={folder}/never", "tracking=off"]  # fmt: skip
    process = subprocess.Popen(command(*arguments, f"hydra.run.dir={folder}/run"), env=environment())
    deadline = time.monotonic() + PATIENCE
    while not (folder / "packed").exists():  # beyond that the run folder does not change
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    yield folder, arguments, process
    process.kill()
    process.wait()


def test_it_is_refused_in_every_way(live, tmp_path):
    folder, arguments, process = live
    before = snapshot(folder / "run")
    export = [*arguments, "job=export", f"init_from={folder}/run", f"export.dir={tmp_path}/out", "cache.follow=false"]
    owner.own(
        tmp_path / "out", "export.dir", "job=export", will_appear=True
    )  # this process stands in for a first export
    ways = {
        "the same command": [*arguments, f"hydra.run.dir={folder}/run"],
        "a requeue": [*arguments, f"hydra.run.dir={folder}/run", "resume=true"],
        "another job": [*export, f"hydra.run.dir={folder}/run"],
        "an arm": [*arguments, f"hydra.run.dir={folder}/run/arms/hard"],
        "above": [*arguments, f"hydra.run.dir={folder}"],
        "export.dir": [*export, f"hydra.run.dir={tmp_path}/e"],
        "a sweep": ["--multirun", *arguments, f"hydra.sweep.dir={folder}", "hydra.sweep.subdir=run", "seed=0,1"],
    }
    started = {
        name: subprocess.Popen(command(*way), env=environment(), stderr=subprocess.PIPE, text=True)
        for name, way in ways.items()
    }
    said = {}
    for name, second in started.items():
        said[name] = errors = second.communicate(timeout=PATIENCE)[1]
        assert second.returncode == 2, (name, errors)
        key, owned = ("export.dir", os.getpid()) if name == "export.dir" else ("hydra.run.dir", process.pid)
        assert errors.startswith(f"error: {key} is ") and len(errors.splitlines()) == 1, (name, errors)
        assert f"pid {owned}" in errors, (name, errors)
    assert snapshot(folder / "run") == before
    assert process.poll() is None
    assert "job=export, since" in said["export.dir"]
    owner.release_all()
    assert list(tmp_path.iterdir()) == []


def test_all_ranks_are_refused(live):
    folder, arguments, process = live
    before = snapshot(folder / "run")
    done = subprocess.run(
        command(*arguments, f"hydra.run.dir={folder}/run", "resume=true", ranks=2),
        env=environment(), capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: hydra.run.dir is")]
    assert lines and all(f"pid {process.pid}" in line for line in lines)
    assert snapshot(folder / "run") == before


def test_what_a_killed_owner_leaves_is_taken_over(live):
    """Last: it ends the live run."""
    folder, arguments, process = live
    process.kill()
    process.wait()
    assert (folder / "run" / ".owner").exists()
    done = run(*arguments, f"hydra.run.dir={folder}/run", "resume=true", "cache.follow_timeout=0.1", code=2)
    assert "no cache appeared within cache.follow_timeout" in done.stderr
    assert not (folder / "run" / ".owner").exists()
