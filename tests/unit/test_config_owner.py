"""Who owns a folder: other processes are real ones, file systems without locks and other hosts are made up."""

import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import psutil
import pytest

from distill.config import owner
from distill.config.errors import ConfigError

HOLD = """
import pathlib, sys
from distill.config import owner
owner.own(pathlib.Path(sys.argv[2]), "hydra.run.dir", "job=teacher", will_appear=sys.argv[1] == "will_appear")
print("owned", flush=True)
sys.stdin.read()
owner.release_all()
"""


@pytest.fixture(autouse=True)
def released():
    yield
    owner.release_all()


@pytest.fixture
def hold():
    """Starts a process that owns a folder until its stdin is closed."""
    started = []

    def start(folder, how="exists"):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, how, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "owned\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def own(folder, job="job=student"):
    owner.own(folder, "hydra.run.dir", job)


def snapshot(folder):
    """Names, bytes and times of all that is in a folder, and of the folder."""
    paths = [folder, *sorted(folder.rglob("*"))]
    return [
        (str(p), p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "") for p in paths
    ]


def test_a_second_process_is_refused_by_name_and_changes_nothing(tmp_path, hold):
    process = hold(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    before = snapshot(tmp_path)
    for folder in ("run", "run/arms/hard", "run/a/b/c", "."):  # itself, below it, and above it
        with pytest.raises(ConfigError) as refused:
            own(tmp_path / folder)
        text = str(refused.value)
        assert f"pid {process.pid}" in text and "job=teacher" in text and "since 20" in text, text
        assert str(tmp_path / "run") in text and os.uname().nodename in text
    assert snapshot(tmp_path) == before
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(ConfigError, match=f"pid {process.pid}"):
        own(tmp_path / "link")
    own(tmp_path / "other")


def test_an_arm_that_runs_on_its_own_keeps_its_parent_from_starting(tmp_path, hold):
    hold(tmp_path / "run" / "arms" / "hard")
    with pytest.raises(ConfigError, match="arms/hard below it belongs to a process"):
        own(tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["arms"]


@pytest.mark.parametrize("killed", [True, False])
def test_it_ends_with_the_process(tmp_path, hold, killed):
    process = hold(tmp_path / "run")
    (tmp_path / "run" / "kept").touch()
    process.kill() if killed else process.communicate()
    process.wait()
    assert (tmp_path / "run" / owner.NAME).exists() == killed
    own(tmp_path / "run")
    assert json.loads((tmp_path / "run" / owner.NAME).read_text())["pid"] == os.getpid()
    owner.release_all()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["kept"]


def test_nothing_empty_is_left_behind(tmp_path):
    own(tmp_path / "a" / "b")
    own(tmp_path / "a" / "b")  # this process may as often as it likes
    own(tmp_path / "a" / "b" / "arms" / "x")
    owner.release_all()
    owner.release_all()
    assert list(tmp_path.iterdir()) == []


def test_of_many_that_start_at_once_one_gets_it(tmp_path):
    script = HOLD.replace("owner.own(", "sys.stdin.readline(); owner.own(")
    folders = ["run", "run", "run/x", "run"] * 2
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, "exists", tmp_path / folder],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for folder in folders
    ]  # fmt: skip
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.stdout.readline() for process in processes]
    assert said.count("owned\n") <= 1  # two that see each other above and below may both give way
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0 or "ConfigError" in errors, errors


def test_children_do_not_keep_it(tmp_path, hold):
    own(tmp_path / "run")
    spawned = subprocess.Popen(["sleep", "100"], close_fds=False)
    forked = os.fork()
    if forked == 0:
        owner.release_all()  # of a child: nothing
        os.execvp("sleep", ["sleep", "100"])
    try:
        assert (tmp_path / "run" / owner.NAME).exists()
        with pytest.raises(AssertionError):  # our own children's lives change nothing while we hold it
            hold(tmp_path / "run")
        (tmp_path / "run" / "kept").touch()
        owner.release_all()
        hold(tmp_path / "run")
    finally:
        spawned.kill()
        spawned.wait()
        os.kill(forked, 9)
        os.waitpid(forked, 0)


def test_a_name_that_will_appear(tmp_path, hold):
    process = hold(tmp_path / "out" / "model", "will_appear")
    assert [p.name for p in (tmp_path / "out").iterdir()] == [f".model{owner.NAME}"]
    with pytest.raises(ConfigError, match=rf"export.dir is .*out/model; it belongs .*pid {process.pid}"):
        owner.own(tmp_path / "out" / "model", "export.dir", "job=export", will_appear=True)
    owner.own(tmp_path / "out" / "other", "export.dir", "job=export", will_appear=True)


def without_locks(monkeypatch):
    def refuse(fd, kind):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_where_there_are_no_locks_the_process_counts(tmp_path, hold, monkeypatch):
    process = hold(tmp_path / "run")
    without_locks(monkeypatch)
    with pytest.raises(ConfigError, match=rf"still running .*pid {process.pid}"):
        own(tmp_path / "run")
    process.kill()
    process.wait()
    own(tmp_path / "run")
    lock = tmp_path / "run" / owner.NAME
    said = json.loads(lock.read_text())
    assert said["pid"] == os.getpid()
    owner.release_all()
    # The number of a dead owner, given to another process since.
    lock.write_text(json.dumps(said | {"started": "1"}))
    own(tmp_path / "run")
    assert json.loads(lock.read_text()) == said | {"since": json.loads(lock.read_text())["since"], "job": "job=student"}


@pytest.mark.parametrize("locks", [True, False])
@pytest.mark.parametrize("kind", ["ext4", "nfs4", "nfs4 local_lock=flock", "lustre", "fuse.sshfs"])
def test_an_owner_on_another_host(tmp_path, monkeypatch, locks, kind):
    """A file system of this kernel, or one whose locks are the same everywhere, tells that it is gone."""
    lock = tmp_path / "run" / owner.NAME
    lock.parent.mkdir()
    own(tmp_path / "run")
    said = json.loads(lock.read_text())
    owner.release_all()
    lock.write_text(json.dumps(said | {"host": "node7", "boot": "another", "pid": 12345}))
    before = snapshot(tmp_path)
    name, _, options = kind.partition(" ")
    root = types.SimpleNamespace(mountpoint="/", fstype=name, opts=f"rw,{options}")
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: [root])
    if not locks:
        without_locks(monkeypatch)
    if locks and kind in ("ext4", "nfs4"):
        own(tmp_path / "run")
        return
    with pytest.raises(ConfigError) as refused:
        own(tmp_path / "run")
    assert "may still be running (host node7, pid 12345" in str(refused.value)
    assert f"remove {lock} and start again" in str(refused.value)
    assert snapshot(tmp_path) == before
    lock.unlink()
    own(tmp_path / "run")


def test_a_folder_that_cannot_be_made_is_a_mistake_of_the_command(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"hydra.run.dir is .*file/run; cannot write there: Not a directory"):
        own(tmp_path / "file" / "run")


def test_mounts_of_this_machine_are_read(monkeypatch):
    mounts = psutil.disk_partitions(all=True)
    assert mounts and all(mount.mountpoint.startswith("/") and mount.fstype for mount in mounts)
    kinds = [("/", "ext4"), ("/data", "fuse.sshfs"), ("/data/fast", "xfs"), ("/data/fast", "fuse.sshfs")]
    mounts = [types.SimpleNamespace(mountpoint=where, fstype=kind, opts="rw") for where, kind in kinds]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts[:last])
    for last, reached in ((0, False), (1, True), (2, False), (3, True), (4, False)):
        assert owner._reaches_all_hosts(Path("/data/fast/run")) == reached, last


def test_default_folders_differ_between_two_processes_of_one_second():
    script = "import distill.config.owner, omegaconf; print(omegaconf.OmegaConf.create({'a': '${token:}'}).a)"
    tokens = {subprocess.check_output([sys.executable, "-c", script], text=True) for _ in range(3)}
    assert len(tokens) == 3
