"""Kill -9 at any moment, the same command with resume=true, and the run ends with bitwise the same losses."""

import random
import subprocess
import time

import numpy as np
import psutil
import pytest
import torch

from distill.cache import Atoms, CacheReader, CacheWriter
from tests.cli import PATIENCE, TINY, command, environment, kill_once, losses, run, write_corpus

STEPS = ["teacher.train.steps=60", "student.train.steps=60", "teacher.train.checkpoint_every=6",
         "student.train.checkpoint_every=6"]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    # More samples than 60 steps take: of one met again, a follower gets the targets that are newest when it looks.
    folder = tmp_path_factory.mktemp("corpus")
    return [write_corpus(folder, documents=60), f"data.dir={folder}/packed"]


@pytest.mark.parametrize("order", ["late_first"])
def test_a_codistillation_killed_at_random_moments_ends_bitwise_alike(tmp_path, data, order):
    arguments = [*TINY, *data, *STEPS, "job=codistill", "codistill.rounds=10", f"student.replay.order={order}",
                 "experiment=smoke", "tracking=off", "~codistill.arms.constant", "~codistill.arms.step",
                 "student.model.parametrization=transfer", "student.model.base.hidden_size=8"]  # fmt: skip
    run(*arguments, f"hydra.run.dir={tmp_path}/whole")
    chance, folder = random.Random(0), tmp_path / "killed"
    total = (tmp_path / "whole" / "metrics.jsonl").stat().st_size
    for share in (0.15, 0.5, 0.9):
        least = int(total * share) + chance.randrange(200)
        kill_once(folder / "metrics.jsonl", least, *arguments, f"hydra.run.dir={folder}", "resume=true")
    # Whatever half-written files lie there.
    (folder / "checkpoints" / "step-00000099.tmp").mkdir(exist_ok=True)
    (folder / "cache" / "shards" / "teacher-00000" / "000000" / "000000999.safetensors.tmp").write_bytes(b"half")
    run(*arguments, f"hydra.run.dir={folder}", "resume=true")
    assert losses(folder) == losses(tmp_path / "whole")
    assert losses(folder / "arms" / "hard") == losses(tmp_path / "whole" / "arms" / "hard")
    teachers = {o.teacher for f in (folder, tmp_path / "whole") for o in CacheReader(f / "cache").summary}
    assert len(teachers) == 1
    again = run(*arguments, f"hydra.run.dir={folder}", "resume=true")
    assert "finished" in again.stdout


def test_a_student_follows_a_live_teacher_and_both_may_be_killed(tmp_path, data):
    teacher = [*TINY, *data, *STEPS, "job=teacher"]
    student = [*TINY, *data, *STEPS, "job=student", "cache.follow=true", "student.replay.order=late_first"]

    def follows(cache, folder):
        arguments = [*student, f"cache.dir={tmp_path}/{cache}/cache", f"hydra.run.dir={tmp_path}/{folder}"]
        return subprocess.Popen(command(*arguments), env=environment(), stderr=subprocess.DEVNULL), arguments

    undisturbed, _ = follows("whole", "alone")
    run(*teacher, f"hydra.run.dir={tmp_path}/whole")
    assert undisturbed.wait(timeout=PATIENCE) == 0

    following, arguments = follows("t", "s")
    shards = tmp_path / "t" / "cache" / "shards" / "teacher-00000" / "000000" / "*.safetensors"
    kill_once(shards, 4, *teacher, f"hydra.run.dir={tmp_path}/t", "resume=true")
    restarted = subprocess.Popen(command(*teacher, f"hydra.run.dir={tmp_path}/t", "resume=true"), env=environment())
    # Not before: a student that starts when the teacher has ended is another one, that knows how it ends.
    deadline = time.monotonic() + PATIENCE
    while not any((tmp_path / "s" / "checkpoints").glob("step-????????")) and time.monotonic() < deadline:
        time.sleep(0.02)
    following.kill()
    following.wait()
    run(*arguments, "resume=true")
    assert restarted.wait(timeout=PATIENCE) == 0
    assert losses(tmp_path / "t") == losses(tmp_path / "whole")
    assert losses(tmp_path / "s") == losses(tmp_path / "alone")


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_a_capture_goes_on_with_another_number_of_ranks(tmp_path, data, before, after):
    """The same targets as in a run that was never stopped; streams of ranks that are gone are complete."""
    teacher = [*TINY, *data, "job=teacher", "teacher.train.steps=24", "teacher.train.checkpoint_every=6",
               "engine=zero1", "cache.shard_samples=5", "cache.index_every=2"]  # fmt: skip
    run(*teacher, f"hydra.run.dir={tmp_path}/whole")
    folder = tmp_path / "cut"
    stop = [f"hydra.run.dir={folder}", "resume=true"]
    killed = subprocess.Popen(command(*teacher, *stop, ranks=before), env=environment(), stderr=subprocess.DEVNULL)
    while not list((folder / "checkpoints").glob("step-00000012*")):
        assert killed.poll() is None
        time.sleep(0.01)
    processes = [*psutil.Process(killed.pid).children(recursive=True), psutil.Process(killed.pid)]  # torchrun's ranks
    for process in processes:
        process.kill()
    killed.wait()
    psutil.wait_procs(processes, timeout=PATIENCE)
    run(*teacher, *stop, ranks=after)
    whole, cut = CacheReader(tmp_path / "whole" / "cache"), CacheReader(folder / "cache")
    assert cut.finished and set(cut.view["streams"]) == {f"teacher-{n:05d}" for n in range(2)}
    every = np.arange(whole.header.samples)
    assert (cut.steps(every) == whole.steps(every)).all() and (whole.steps(every) >= 0).sum() == 96
    assert cut.losses.curve().tokens.sum() >= whole.losses.curve().tokens.sum()


def relabel(folder):
    """A later teacher's targets for every sample: all of them say id 0."""
    reader = CacheReader(folder)
    width = reader.header.sample_tokens
    with CacheWriter(folder, reader.header, writer="later", source="backfill") as writer:
        for sample in reader.samples():
            ones = torch.ones(width, dtype=torch.int32)
            atoms = Atoms(ones, ones * 0, ones * reader.codec.total, torch.empty(0, dtype=torch.uint8))
            ids, digests = np.array([sample.sample_id]), np.array([sample.digest], np.uint64)
            facts = (ids, digests, atoms, -ones.float(), ones.float(), ones.bool())
            writer.put(*facts, step=10**6, tokens_seen=0, teacher="later")


def test_a_student_s_view_of_the_cache_is_in_its_checkpoint(tmp_path, data):
    """What is published after a kill does not reach the run that goes on; a new run finds it."""
    run(*TINY, *data, *STEPS, "job=teacher", f"hydra.run.dir={tmp_path}/t")
    student = [*TINY, *data, *STEPS, "job=student", f"cache.dir={tmp_path}/t/cache"]
    run(*student, f"hydra.run.dir={tmp_path}/whole")
    folder = tmp_path / "cut"
    kill_once(folder / "checkpoints" / "step-00000018*", 1, *student, f"hydra.run.dir={folder}", "resume=true")
    relabel(tmp_path / "t" / "cache")
    run(*student, f"hydra.run.dir={folder}", "resume=true")
    assert losses(folder) == losses(tmp_path / "whole")
    run(*student, f"hydra.run.dir={tmp_path}/new")
    assert losses(tmp_path / "new") != losses(tmp_path / "whole")


def test_a_damaged_checkpoint_costs_steps_not_the_run(tmp_path, data):
    arguments = [*TINY, *data, "job=student", "student.cached=false", "student.train.steps=20",
                 "student.train.checkpoint_every=4", "student.train.keep_checkpoints=3"]  # fmt: skip
    run(*arguments, f"hydra.run.dir={tmp_path}/whole")
    folder = tmp_path / "cut"
    kill_once(folder / "checkpoints" / "step-0000001[2-9]", 1, *arguments, f"hydra.run.dir={folder}", "resume=true")
    newest = max((folder / "checkpoints").glob("step-*[0-9]"))
    victim = newest / "student-00000.safetensors"
    victim.write_bytes(victim.read_bytes()[:-100])
    done = run(*arguments, f"hydra.run.dir={folder}", "resume=true")
    assert "damaged checkpoint" in done.stderr + done.stdout
    assert losses(folder) == losses(tmp_path / "whole")


def test_bad_resumes_are_refused_with_both_values(tmp_path, data):
    arguments = [
        *TINY,
        *data,
        "job=student",
        "student.cached=false",
        "student.train.steps=4",
        f"hydra.run.dir={tmp_path}/r",
    ]
    run(*arguments)
    before = (tmp_path / "r" / "metrics.jsonl").read_bytes()
    changed = run(*arguments, "student.model.hidden_size=24", "resume=true", code=2)
    assert "student.model.hidden_size is 24; the run in" in changed.stderr and "started with 16" in changed.stderr
    twice = run(*arguments, code=2)
    assert "holds a run: set resume=true" in twice.stderr
    for done in (changed, twice):
        assert "Traceback" not in done.stderr
    assert (tmp_path / "r" / "metrics.jsonl").read_bytes() == before
