"""Caches where nothing grows and nothing is renamed: in memory, and on an object store that speaks S3."""

import multiprocessing
import pickle
import re
import shutil

import fsspec
import numpy as np
import pytest
import torch

from distill.cache import CacheReader, CacheWriter, is_created, is_written
from distill.cache.far import FarStore
from distill.cache.ledger import LedgerReader
from distill.cache.local import LocalStore
from distill.cache.open_store import open_store
from distill.cache.seal import seal, unseal
from distill.config.errors import CacheError
from distill.tools.repair import repair
from tests.cli import PATIENCE
from tests.objects import object_store
from tests.workers.cache_writers import SAMPLES, S, digests, header, put

ALL = np.arange(SAMPLES)


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch, object_store(patch) as server:
        yield server


def _folder(request):
    return re.sub(r"\W+", "-", request.node.name)


@pytest.fixture(params=["memory", "s3"])
def url(request):
    """Of a folder that is not there yet."""
    if request.param == "memory":
        yield f"memory://{_folder(request)}"
        fsspec.filesystem("memory").store.clear()
    else:
        request.getfixturevalue("server")
        yield f"s3://shelf/{_folder(request)}"


@pytest.fixture
def s3(server, request):
    yield server, f"s3://shelf/{_folder(request)}"
    server.fail = lambda number, method, path: None


def write(folder, samples, writer="w", step=0, **options):
    with CacheWriter(folder, header(), writer=writer, shard_samples=2, **options) as cache:
        for i in range(0, len(samples), 2):
            put(cache, samples[i : i + 2], step=step)


def same(reader, other, samples=ALL):
    got, want = (r.read(samples, digests(samples)) for r in (reader, other))
    return all(torch.equal(a, b) for a, b in zip((*got.targets, got.step_B), (*want.targets, want.step_B)))


def put_file(url, data):
    fs, path = fsspec.core.url_to_fs(url)
    fs.pipe_file(path, data)


def test_what_lies_far_away_reads_like_what_lies_here(url, tmp_path):
    """In any order, whole batches and single samples, with gaps."""
    samples = [*range(3, 30), 35]
    for folder in (url, tmp_path):
        write(folder, samples, counts_V=np.arange(64) % 17)
    assert is_created(url) and is_written(url) and not is_written(url + "/nowhere")
    far, near = CacheReader(url), CacheReader(tmp_path)
    assert far.header == near.header and far.view == near.view == {"w": 14}
    rng = np.random.default_rng(0)
    assert same(far, near)
    for _ in range(10):
        assert same(far, near, rng.permutation(SAMPLES)[: rng.integers(1, 9)])
    assert [s[:-1] for s in far.samples()] == [s[:-1] for s in near.samples()]


def test_a_reader_follows_and_a_writer_goes_on(url):
    with CacheWriter(url, header(), writer="w", shard_samples=2) as writer:
        reader = CacheReader(url)
        for first in range(0, 8, 2):
            put(writer, [first, first + 1])
            writer.flush()
            assert not reader.covers(np.array([first]))[0]
            assert reader.refresh() == 1 and reader.refresh() == 0
            assert reader.covers(ALL).tolist() == [i < first + 2 for i in range(SAMPLES)]
    view = reader.view
    with CacheWriter(url, header(), writer="w", shard_samples=2) as writer:
        put(writer, [0, 1])  # done before: passed over
        put(writer, [20, 21])
        writer.finish()
    assert reader.refresh() == 1 and reader.finished
    assert CacheReader(url, view).view == view and not CacheReader(url, view).covers(np.array([20]))[0]


def test_two_writers_of_one_name_lose_nothing(url):
    """The second to take the row's name is told, and what the first has published stays."""
    one = CacheWriter(url, header(), writer="w", shard_samples=2)
    two = CacheWriter(url, header(), writer="w", shard_samples=2)
    put(one, [0, 1])
    one.flush()
    put(two, [2, 3])
    with pytest.raises(CacheError, match=r"ledger/w/000000000.json: another live process has the writer's name 'w'"):
        two.flush()
    put(one, [4, 5])
    one.close()
    two.close()
    reader = CacheReader(url)
    assert reader.covers(np.arange(6)).tolist() == [True, True, False, False, True, True]
    reader.read(np.arange(6), digests(np.arange(6)))


def test_another_cache_is_refused(url):
    write(url, [0, 1])
    with pytest.raises(CacheError, match="corpus is 'corp' in the cache, 'other' in this run"):
        CacheWriter(url, header(corpus="other"), writer="v")


@pytest.mark.parametrize("start", ["here", "far"])
def test_plain_copies_move_a_cache_either_way(url, tmp_path, start):
    """And each copy goes on growing: rows of a file first, objects behind them."""
    here = tmp_path / "here"
    write(here if start == "here" else url, list(range(10)))
    fs, path = fsspec.core.url_to_fs(url)
    if start == "here":
        for file in sorted(here.rglob("*")):
            if file.is_file() and file.suffix != ".lock":
                fs.pipe_file(f"{path}/{file.relative_to(here)}", file.read_bytes())
    else:
        for name in fs.find(path):
            file = here / name.split(path.strip("/") + "/", 1)[1]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(fs.cat_file(name))
    assert same(CacheReader(url), CacheReader(here))
    assert (here / "ledger" / "w.jsonl").exists() == (start == "here")
    followers = CacheReader(url), CacheReader(here)
    for folder in (url, here):
        write(folder, list(range(10, 20)))
        write(folder, [20, 21], writer="v")
    for reader in followers:
        assert reader.refresh() == 6
    assert same(*followers) and same(CacheReader(url), CacheReader(here))
    assert CacheReader(url).view == CacheReader(here).view == {"v": 1, "w": 10}
    assert followers[0].covers(ALL).sum() == 22


def test_a_copied_ledger_that_is_copied_again_is_followed(url, tmp_path):
    write(tmp_path, list(range(4)))

    def copy():
        for file in tmp_path.rglob("*"):
            if file.is_file() and file.suffix != ".lock":
                put_file(f"{url}/{file.relative_to(tmp_path)}", file.read_bytes())

    copy()
    reader = CacheReader(url)
    write(tmp_path, list(range(4, 10)))
    copy()
    assert reader.refresh() == 3 and same(reader, CacheReader(tmp_path))


def test_a_torn_row_of_a_copied_file_is_removed_and_the_file_stays(url, tmp_path):
    """By a writer that goes on, and by a repair."""
    write(tmp_path, range(8))
    rows = (tmp_path / "ledger/w.jsonl").read_bytes()
    for name, take in (("a", lambda folder: write(folder, [8])), ("b", lambda folder: repair(open_store(folder)))):
        folder = f"{url}/{name}"
        for path in tmp_path.rglob("*"):
            if path.is_file():
                put_file(f"{folder}/{path.relative_to(tmp_path)}", path.read_bytes())
        put_file(f"{folder}/ledger/w.jsonl", rows + rows[:50])
        take(folder)
        assert open_store(folder).read("ledger/w.jsonl") == rows
        assert CacheReader(folder).covers(range(8)).all() and not CacheReader(folder).torn


def test_a_missing_row_is_told(url):
    write(url, list(range(8)))
    FarStore(url).remove("ledger/w/000000001.json")
    with pytest.raises(CacheError, match=f"{url}/ledger/w/000000001.json: the row is missing"):
        CacheReader(url)


@pytest.mark.parametrize("cut", [0, 1, 30])
def test_a_row_whose_upload_is_seen_is_not_used_before_its_end(url, cut):
    """File systems such as sftp show a file while it grows. A writer that comes after one that died replaces it."""
    write(url, list(range(6)))
    store, name = FarStore(url), "ledger/w/000000002.json"
    whole = store.read(name)
    reader = CacheReader(url, {"w": 2})
    store.publish(name, whole[:cut] if cut < 30 else whole[:-1])
    assert reader.refresh() == 0 and CacheReader(url).view == {"w": 2}
    store.publish(name, whole)
    assert reader.refresh() == 1
    store.publish(name, whole[:cut])
    write(url, [30, 31])
    assert CacheReader(url).covers(np.array([3, 4, 30])).tolist() == [True, False, True]


def test_a_damaged_or_cut_shard_is_found(url):
    write(url, [0, 1])
    (row,) = CacheReader(url).rows
    store, name = FarStore(url), f"shards/{row.shard}"
    whole = store.read(name)
    for at in (row.index_bytes // 2, row.index_bytes + 3, len(whole) - 1):
        store.publish(name, whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(CacheError, match=f"{url}/shards/.* is damaged"):
            CacheReader(url).read(np.arange(2), digests(np.arange(2)))
    for size in (len(whole) - 1, row.index_bytes, row.index_bytes - 1, 0):
        store.publish(name, whole[:size])
        with pytest.raises(CacheError, match=f"{url}/shards/"):
            CacheReader(url).read(np.arange(2), digests(np.arange(2)))
    store.remove(name)
    with pytest.raises(CacheError, match=f"{url}/shards/.*: no such file"):
        CacheReader(url)


class PlainMemory(fsspec.get_filesystem_class("memory")):
    """A file system that cannot put on a condition."""

    protocol = "plain"
    store = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    def pipe_file(self, path, value, **options):
        if options.get("mode") == "create":
            raise NotImplementedError
        super().pipe_file(path, value)


def test_without_conditional_puts_a_row_that_is_there_is_not_replaced():
    fsspec.register_implementation("plain", PlainMemory, clobber=True)
    write("plain://cache", [0, 1])
    store = open_store("plain://cache")
    row = store.read("ledger/w/000000000.json")
    assert not store.create("ledger/w/000000000.json", b"x") and store.read("ledger/w/000000000.json") == row
    assert CacheReader("plain://cache").covers(ALL).sum() == 2


def test_what_another_client_puts_is_seen(s3):
    """No listing is kept: sizes, names and rows are what they are now."""
    _, url = s3
    write(url, [0, 1])
    reader, store = CacheReader(url), open_store(url)
    assert store.names("ledger/w") == ["000000000.json"] and not store.exists("ledger/v.jsonl")
    store.names("ledger")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    write(url, [2, 3])
    write(url, [4, 5], writer="v")
    put_file(f"{url}/ledger/x.jsonl", b"")
    assert store.names("ledger/w") == ["000000000.json", "000000001.json"]
    assert store.names("ledger") == ["v", "w", "x.jsonl"] and store.size("ledger/x.jsonl") == 0
    assert reader.refresh() == 2


def test_errors_name_the_url(s3):
    _, url = s3
    for folder, reason in (
        (url, "no cache here"),
        ("s3://no-such-bucket/x", "no cache here"),
        ("nonsense://x", "Protocol not known: nonsense"),
    ):
        with pytest.raises(CacheError) as caught:
            CacheReader(folder)
        assert folder in str(caught.value) and reason in str(caught.value)
    with pytest.raises(CacheError, match=r"s3://no-such-bucket/x/ranks-.*: no such file, folder or bucket"):
        CacheWriter("s3://no-such-bucket/x", header(), writer="w")


def test_requests_that_fail_are_sent_again(s3):
    server, url = s3
    server.fail = lambda number, method, path: "503 Service Unavailable" if number % 7 == 0 else None
    write(url, list(range(6)))
    assert CacheReader(url).read(np.arange(6), digests(np.arange(6))).targets.covered_T.sum() == 6 * (S - 1)


def test_a_row_whose_answer_was_lost_is_published_once(s3):
    """The put is done, the answer does not arrive; sent again, it finds its own row."""
    server, url = s3
    seen = set()

    def fail(number, method, path):
        if method == "PUT" and "/ledger/" in path and path not in seen:
            seen.add(path)
            return "drop"
        return None

    server.fail = fail
    write(url, list(range(6)))
    assert len(seen) == 3 and CacheReader(url).view == {"w": 3}


@pytest.mark.parametrize("part", ["shards", "ledger"])
def test_an_upload_that_dies_leaves_nothing_to_see(s3, part):
    """Shard or row; the writer that comes next does it again."""
    server, url = s3
    write(url, [0, 1])
    server.fail = lambda number, method, path: "403 Forbidden" if method == "PUT" and f"/{part}/" in path else None
    with pytest.raises(CacheError, match=f"{url}/{part}/"):
        write(url, [2, 3])
    server.fail = lambda number, method, path: None
    assert CacheReader(url).view == {"w": 1}
    write(url, [2, 3])
    assert CacheReader(url).covers(np.arange(4)).all() and CacheReader(url).view == {"w": 2}


def test_a_large_upload_that_dies_in_the_middle_leaves_nothing_to_see(s3):
    server, url = s3
    store = FarStore(url)
    server.fail = lambda number, method, path: "403 Forbidden" if method == "PUT" and number % 2 else None
    with pytest.raises(CacheError, match=f"{url}/shards/large"):
        store.publish("shards/large", bytes(110 << 20))  # parts of 50 MiB
    server.fail = lambda number, method, path: None
    assert not store.exists("shards/large") and store.names("shards") == []


def _read_in_child(reader, queue):
    queue.put(reader.read(np.arange(4), digests(np.arange(4))).targets.ids_TK.sum().item())


def test_a_reader_survives_a_fork_and_a_pickle(s3):
    _, url = s3
    write(url, list(range(4)))
    reader = CacheReader(url)
    want = reader.read(np.arange(4), digests(np.arange(4))).targets.ids_TK.sum().item()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(reader, queue), daemon=True)
    child.start()
    assert queue.get(timeout=PATIENCE) == want
    child.join()
    write(url, [8, 9])
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.view == reader.view == {"w": 2}
    assert copy.refresh() == 1


def test_many_rows_take_a_request_each(s3):
    """Not one after the other, and no list or size for each."""
    server, url = s3
    store = FarStore(url)
    write(url, [0, 1])
    row = store.read("ledger/w/000000000.json")
    identity = CacheReader(url).header.identity

    def copy(seq):
        store.publish(f"ledger/w/{seq:09d}.json", seal(unseal(row) | {"seq": seq}))

    store.map(copy, range(1, 150))
    folder = url.removeprefix("s3:/")

    def requests():
        """Of this cache's own files: an upload that another test broke off may still be sent again."""
        return [path for _, path in server.requests if path.startswith(folder)]

    server.requests.clear()
    ledger = LedgerReader(store, "w", identity)
    assert len(ledger.poll()) == 150
    assert 150 <= len(requests()) <= 152
    server.requests.clear()
    assert ledger.poll() == [] and len(requests()) == 1


def test_a_url_of_this_machine_is_a_path(tmp_path):
    assert isinstance(open_store(f"file://{tmp_path}"), LocalStore)
    write(f"file://{tmp_path}/c", [0, 1])
    assert CacheReader(tmp_path / "c").covers(ALL).sum() == 2
    shutil.rmtree(tmp_path / "c")
    assert not is_created(f"file://{tmp_path}/c")
