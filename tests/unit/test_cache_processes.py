"""A reader in other processes and threads, whatever any of them refreshes; the lock of a writer whose process forks."""

import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from distill.cache import CacheReader, CacheWriter, cataloging
from distill.cache.format import writer_lock
from distill.cache.open_store import open_store
from distill.config.errors import CacheError
from tests.cli import PATIENCE
from tests.workers.cache_readers import answer, right
from tests.workers.cache_writers import SAMPLES, digests, header, put


def steps_of(*pairs):
    return {i: step for step, ids in pairs for i in ids}


BEFORE = steps_of((0, range(0, 9)), (3, range(4, 12)))
AFTER = BEFORE | steps_of((5, range(10, 20)))


def begin(folder):
    """A cache with listings and shards behind them."""
    for writer, step, ids in (("a", 0, range(0, 9)), ("b", 3, range(4, 12))):
        with CacheWriter(folder, header(), writer=writer, shard_samples=2, index_every=2) as cache:
            for i in ids:
                put(cache, [i], step=step)
    shutil.rmtree(folder / "catalog")
    store = open_store(folder)
    cataloging.update(store, CacheReader(folder).header, ["a"])


def go_on(folder):
    with CacheWriter(folder, header(), writer="c", shard_samples=3, index_every=1) as cache:
        for i in range(10, 20):
            put(cache, [i], step=5)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_reader_is_right_in_children_whatever_any_of_them_refreshes(tmp_path, method):
    begin(tmp_path)
    reader = CacheReader(tmp_path)
    assert right(reader, BEFORE)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    go_on(tmp_path)
    children = [
        context.Process(target=answer, args=(reader, BEFORE, AFTER, n % 2 == 0, queue), daemon=True) for n in range(4)
    ]
    for number, child in enumerate(children):
        child.start()
        if number == 1:
            assert right(reader, BEFORE)
            reader.refresh()
            assert right(reader, AFTER)
            children[2]._args = children[3]._args = (reader, AFTER, AFTER, True, queue)
    answers = [queue.get(timeout=PATIENCE) for _ in children]
    assert sorted(map(str, answers)) == sorted(map(str, [[True, True], [True], [True, True], [True, True]]))
    assert right(reader, AFTER)


def test_a_pickled_reader_works_in_another_working_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    begin(tmp_path / "here/cache")
    monkeypatch.chdir(tmp_path / "here")
    reader = CacheReader("cache")
    go_on(tmp_path / "here/cache")
    data = pickle.dumps(reader)
    monkeypatch.chdir(tmp_path / "there")
    copy = pickle.loads(data)
    assert copy.view == reader.view and right(copy, BEFORE)
    copy.refresh()
    assert right(copy, AFTER)
    again = pickle.loads(pickle.dumps(copy))
    assert right(again, AFTER) and again.view == copy.view


def test_a_reader_of_a_relative_path_works_after_its_process_has_moved(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    begin(tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    reader = CacheReader("cache")
    monkeypatch.chdir(tmp_path / "there")
    go_on(tmp_path / "cache")
    assert right(reader, BEFORE)
    copy = pickle.loads(pickle.dumps(reader))
    reader.refresh()
    copy.refresh()
    assert right(reader, AFTER) and right(copy, AFTER)


def test_threads_share_a_reader_while_any_of_them_refreshes(tmp_path):
    begin(tmp_path)
    reader, wrong, stop = CacheReader(tmp_path), [], threading.Event()

    def ask(seed):
        draw = np.random.default_rng(seed)
        while not stop.is_set():
            ids = draw.permutation(SAMPLES)[:8]
            result = reader.read(ids, digests(ids))
            for i, step in zip(ids.tolist(), result.step_B.tolist()):
                if step not in (BEFORE.get(i, -1), AFTER.get(i, -1)):
                    wrong.append((i, step))
            if draw.random() < 0.3:
                reader.refresh()

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    go_on(tmp_path)
    stop.set()
    for thread in threads:
        thread.join()
    reader.refresh()
    assert not wrong and right(reader, AFTER)


def sleep_for_long():
    signal.pause()


def test_a_writers_lock_ends_with_close_though_a_child_of_a_fork_lives(tmp_path):
    """And the child that ends does not release its parent's lock."""
    writer = CacheWriter(tmp_path, header(), writer="w")
    store = open_store(tmp_path)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=sleep_for_long, daemon=True)
    child.start()
    short = context.Process(target=int, daemon=True)
    short.start()
    short.join()
    with pytest.raises(CacheError, match=f"another live process .pid {os.getpid()}. holds the writer's name 'w'"):
        CacheWriter(tmp_path, header(), writer="w")
    assert store.is_locked(writer_lock("w"))
    put(writer, [1])
    writer.close()
    assert not store.is_locked(writer_lock("w")) and child.is_alive()
    with CacheWriter(tmp_path, header(), writer="w") as again:
        put(again, [2])
    child.kill()
    child.join()
    assert CacheReader(tmp_path).covers(np.array([1, 2])).all()


def die_with_a_child(folder, queue):
    """Opens a writer, forks a child that lives on, and is killed."""
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    writer = CacheWriter(folder, header(), writer="w")
    put(writer, [1])
    writer.flush()
    queue.put(os.fork() or signal.pause())
    queue.close()
    queue.join_thread()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_writers_lock_ends_with_its_process_though_a_child_of_a_fork_lives(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=die_with_a_child, args=(tmp_path, queue), daemon=True)
    process.start()
    child = queue.get(timeout=PATIENCE)
    process.join()
    try:
        with CacheWriter(tmp_path, header(), writer="w") as writer:
            put(writer, [2])
    finally:
        os.kill(child, signal.SIGKILL)
    assert CacheReader(tmp_path).covers(np.array([1, 2])).all()


def use(writer, queue):
    """What a child of a fork gets from the writer of its parent."""
    torch.set_num_threads(1)
    for call in (lambda: put(writer, [5]), writer.flush, writer.close):
        try:
            call()
        except CacheError as error:
            queue.put(str(error))
        else:
            queue.put("taken")


def test_a_child_of_a_fork_cannot_use_its_parents_writer(tmp_path):
    """It would wait for ever for a thread that it does not have, or lose what it puts."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with CacheWriter(tmp_path, header(), writer="w") as writer:
        put(writer, [1])
        child = context.Process(target=use, args=(writer, queue), daemon=True)
        child.start()
        found = [queue.get(timeout=PATIENCE) for _ in range(3)]
        child.join()
        assert all("'w' belongs to the process that has opened it" in each for each in found), found
        put(writer, [2])
    assert CacheReader(tmp_path).covers(np.array([1, 2, 5])).tolist() == [True, True, False]


HELD = """
import os, sys
from distill.cache import CacheReader
from tests.unit.test_cache_processes import BEFORE
from tests.workers.cache_readers import right

reader = CacheReader(sys.argv[1])
assert right(reader, BEFORE)
reader.refresh()
links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
opened = [os.readlink(link) for link in links if os.path.exists(link)]
assert not [name for name in opened if name.startswith(sys.argv[1])], opened
assert sys.argv[1] not in open("/proc/self/maps").read()
"""


def test_a_reader_keeps_no_file_open_and_writes_nothing(tmp_path):
    begin(tmp_path)
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    done = subprocess.run([sys.executable, "-c", HELD, tmp_path], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before
