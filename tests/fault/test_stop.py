"""Ctrl-C and SIGTERM end a run anywhere, and the same command ends it bitwise alike; a closed pipe ends nothing."""

import json
import subprocess
import sys

import pytest

from tests.cli import TINY, command, default_signals, environment, losses, run, write_corpus

STEP = "distill.run.trainer:Trainer._train_step"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return [*TINY, write_corpus(folder, documents=60), f"data.dir={folder}/packed"]


def stop(place, call, number, *arguments):
    """The command with a signal at a place (tests/workers/stopping.py); exit code, and the last line of stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.workers.stopping", place, str(call), number, *arguments],
        env=environment(), capture_output=True, text=True, timeout=170, preexec_fn=default_signals,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr.strip().splitlines()[-1]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def manifest(checkpoint):
    return json.loads(json.loads((checkpoint / "manifest.json").read_text())["manifest"])


@pytest.mark.timeout(400)  # five runs; twenty seconds on a machine with nothing else to do
def test_a_codistillation_stopped_between_rows_shards_and_turns_ends_bitwise_alike(tmp_path, data):
    """Rounds of eight steps, shards of five and rows of four: no stop is at the end of any."""
    arguments = [*data, "experiment=smoke", "job=codistill", "codistill.rounds=3", "cache.shard_samples=20",
                 "tracking=off", "~codistill.arms.constant", "~codistill.arms.step", "student.replay.order=same",
                 "teacher.train.steps=24", "student.train.steps=24", "teacher.train.log_every=4",
                 "student.train.log_every=4"]  # fmt: skip
    run(*arguments, f"hydra.run.dir={tmp_path}/whole")
    folder = tmp_path / "stopped"
    again = [*arguments, f"hydra.run.dir={folder}", "resume=true"]

    code, said = stop(STEP, 6, "SIGTERM", *again)  # in the teacher's sixth step
    assert (code, said) == (
        75,
        f"stopped: {folder}/checkpoints/step-00000006 remains; the same command with hydra.run.dir={folder} "
        "resume=true goes on from it",
    )
    assert "rest-00000.safetensors" in names(folder / "checkpoints" / "step-00000006")
    # In the student's second step: what the teacher has published since the checkpoint it will make once more.
    code, said = stop(STEP, 4, "SIGINT", *again)
    assert (code, said) == (130, f"interrupted: {folder}/checkpoints/step-00000006 remains; {said.split('; ')[1]}")
    code, _ = stop(STEP, 5, "SIGTERM", *again)  # in the student's third step, with two thirds of the teacher's to come
    state = manifest(folder / "checkpoints" / "step-00000011")["state"]
    assert (code, state["roles"]["teacher"]["step"], state["roles"]["student"]["step"]) == (75, 8, 3)
    assert not [*folder.rglob("*.tmp"), *folder.glob(".owner")]

    run(*again)
    assert losses(folder) == losses(tmp_path / "whole")
    assert losses(folder / "arms" / "hard") == losses(tmp_path / "whole" / "arms" / "hard")
    # The names of shards hold their digests.
    assert names(folder / "cache" / "shards") == names(tmp_path / "whole" / "cache" / "shards")


@pytest.mark.parametrize(
    ("place", "number", "code", "words"),
    [
        ("distill.config.checks:check", "SIGINT", 130, "nothing was begun"),
        ("distill.data.pack:pack", "SIGTERM", 75, "nothing was begun; the same command starts it"),
        ("student.evaluate:evaluate", "SIGINT", 130, "checkpoints/step-00000003 remains"),
    ],
)
def test_phases_without_steps_end_soon_and_cleanly(tmp_path, data, place, number, code, words):
    folder = tmp_path / "run"
    got, said = stop(
        place, 1, number, *data, "job=student", "student.cached=false", "student.train.steps=3",
        f"data.dir={tmp_path}/packed", f"hydra.run.dir={folder}",
    )  # fmt: skip
    assert got == code and words in said, said
    assert not [*tmp_path.rglob("*.tmp"), *tmp_path.rglob(".owner"), *tmp_path.rglob("summary.json")]
    assert folder.exists() == ("remains" in said)


def test_closed_pipes_do_not_end_training(tmp_path, data):
    """Both are closed before the run has written anything."""
    folder = tmp_path / "run"
    arguments = [*data, "job=student", "student.cached=false", "student.train.steps=3", f"hydra.run.dir={folder}"]
    process = subprocess.Popen(command(*arguments), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=170) == 0
    assert (folder / "summary.json").exists()


@pytest.mark.parametrize("streams", ["| true", "2>&1 | true", ">&-", ">&- 2>&-", "> /dev/full"])
def test_a_stream_that_goes_away_falls_silent(tmp_path, streams):
    script = (
        "import sys; from distill.config.streams import spared\n"
        "with spared():\n"
        "    for _ in range(3): print('x' * 100000); sys.stderr.write('e'); sys.stdout.flush()\n"
        "    print('left in the buffer')\n"
        "open(sys.argv[1], 'w').write('done')\n"
        "sys.exit(7)"
    )
    told = tmp_path / "told"
    shell = f'{sys.executable} -c "$0" {told} {streams}; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", shell, script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, told.read_text()) == ("7\n", "done")
    assert "Error" not in done.stderr and "ignored" not in done.stderr


def test_a_tool_whose_reader_has_seen_enough_ends_quietly():
    shell = f"{sys.executable} -m distill.tools stats tests/golden/cache-v3 | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], env=environment(), capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("141\n", "")
