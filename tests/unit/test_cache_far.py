"""Caches where nothing grows and nothing is renamed: in memory, and on an object store that speaks S3."""

import multiprocessing
import pickle
import re
import shutil

import fsspec
import numpy as np
import pytest
import torch

from distill.cache import CacheReader, CacheWriter, cataloging, is_created, is_written
from distill.cache.far import FarStore
from distill.cache.local import LocalStore
from distill.cache.open_store import open_store
from distill.config.errors import CacheError
from tests import format_reader
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
    assert far.header == near.header and far.view == near.view == {"snapshot": 0, "streams": {"w": 15}}
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
        assert writer.stats.passed == 2
    assert reader.refresh() == 2 and reader.finished
    assert CacheReader(url, view).view == view and not CacheReader(url, view).covers(np.array([20]))[0]


def test_two_writers_of_one_name_lose_nothing(url):
    """The second to take a shard's name stops, and what the first has published stays."""
    one = CacheWriter(url, header(), writer="w", shard_samples=2)
    two = CacheWriter(url, header(), writer="w", shard_samples=2)
    put(one, [0, 1])
    one.flush()
    put(two, [2, 3])
    with pytest.raises(
        CacheError, match=r"shards/w/000000/000000001.safetensors: another live process has the writer's name 'w'"
    ):
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
    """And each copy goes on growing."""
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
    followers = CacheReader(url), CacheReader(here)
    for folder in (url, here):
        write(folder, list(range(10, 20)))
        write(folder, [20, 21], writer="v")
    for reader in followers:
        assert reader.refresh() == 7  # a mark of v, and six shards
    assert same(*followers) and same(CacheReader(url), CacheReader(here))
    assert CacheReader(url).view == CacheReader(here).view == {"snapshot": 2, "streams": {"v": 2, "w": 11}}
    assert followers[0].covers(ALL).sum() == 22
    assert format_reader.catalog(here) == format_reader.newest(here)


def test_a_copy_without_its_catalog_reads_the_same(url, tmp_path):
    write(tmp_path, list(range(10)))
    for file in tmp_path.rglob("*"):
        if file.is_file() and file.suffix not in (".lock", ".listing") and file.parent.name != "catalog":
            put_file(f"{url}/{file.relative_to(tmp_path)}", file.read_bytes())
    reader = CacheReader(url)
    assert same(reader, CacheReader(tmp_path)) and reader.view["snapshot"] == -1
    cataloging.update(open_store(url), reader.header)
    assert same(CacheReader(url), reader) and CacheReader(url).view["snapshot"] == 0
    assert reader.refresh() == 0 and reader.view["snapshot"] == 0


def test_a_cache_that_is_copied_again_is_followed(url, tmp_path):
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


def test_a_missing_shard_is_named(url):
    """Unless a listing has it: then it is named when it is read."""
    write(url, list(range(8)))
    store = FarStore(url)
    store.remove("shards/w/000000/000000002.safetensors")
    with pytest.raises(CacheError, match=f"{url}/shards/w/000000/000000002.safetensors: no such file"):
        CacheReader(url).read([2], digests([2]))
    for name in store.names("catalog"):
        store.remove(f"catalog/{name}")
    with pytest.raises(CacheError, match=f"{url}/shards/w/000000/000000002.safetensors: the shard is missing"):
        CacheReader(url)


def test_a_damaged_or_cut_shard_is_found(url):
    """With a listing, and without."""
    write(url, [0, 1])
    store, name = FarStore(url), "shards/w/000000/000000001.safetensors"
    whole = store.read(name)
    index = 8 + int.from_bytes(whole[:8], "little")
    records = index + 2 * 42
    for _ in range(2):
        CacheReader(url).read([0, 1], digests([0, 1]))
        listed = CacheReader(url).view["snapshot"] >= 0
        for at in (3, index // 2, index, index + 50, records, len(whole) - 1):
            store.publish(name, whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            if not listed or at >= records:
                with pytest.raises(CacheError, match=f"{url}/shards/.* is damaged"):
                    CacheReader(url).read([0, 1], digests([0, 1]))
            else:
                CacheReader(url).read([0, 1], digests([0, 1]))  # not needed: a listing has it
        for size in (len(whole) - 1, records, records - 1, index, 5, 0):
            store.publish(name, whole[:size])
            with pytest.raises(CacheError, match=f"{url}/shards/"):
                CacheReader(url).read([0, 1], digests([0, 1]))
        store.publish(name, whole)
        for name_of in store.names("catalog"):
            store.remove(f"catalog/{name_of}")


def test_listings_far_away_are_read_in_parts(s3):
    """Opening takes the footer, a look-up the blocks that it needs; damage of either is named, and the shards serve."""
    server, url = s3
    write(url, list(range(40)))
    store = FarStore(url)
    (name,) = (name for name in store.names("catalog") if name.endswith(".listing"))
    whole = store.read(f"catalog/{name}")
    server.requests.clear()
    reader = CacheReader(url)
    ours = [path for _, path in server.requests if path.startswith(url.removeprefix("s3:/"))]
    assert len(ours) <= 8, ours
    want = reader.read(ALL, digests(ALL))
    for at in (100, len(whole) - 300):
        store.publish(f"catalog/{name}", whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        got = CacheReader(url).read(ALL, digests(ALL))
        assert torch.equal(got.targets.ids_TK, want.targets.ids_TK) and torch.equal(got.step_B, want.step_B)


class PlainMemory(fsspec.get_filesystem_class("memory")):
    """A file system that cannot put on a condition."""

    protocol = "plain"
    store = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    def pipe_file(self, path, value, **options):
        if options.get("mode") == "create":
            raise NotImplementedError
        super().pipe_file(path, value)


def test_without_conditional_puts_a_shard_that_is_there_is_not_replaced():
    fsspec.register_implementation("plain", PlainMemory, clobber=True)
    write("plain://cache", [0, 1])
    store, name = open_store("plain://cache"), "shards/w/000000/000000001.safetensors"
    shard = store.read(name)
    assert not store.create(name, b"x") and store.read(name) == shard
    assert CacheReader("plain://cache").covers(ALL).sum() == 2


def test_what_another_client_puts_is_seen(s3):
    """No list of files is kept: sizes and names are what they are now."""
    _, url = s3
    write(url, [0, 1])
    reader, store = CacheReader(url), open_store(url)
    group = "shards/w/000000"
    assert store.names(group) == [f"00000000{n}.safetensors" for n in range(2)] and not store.exists("shards/x")
    store.names("shards")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    write(url, [2, 3])
    write(url, [4, 5], writer="v")
    put_file(f"{url}/shards/x", b"")
    assert store.names(group) == [f"00000000{n}.safetensors" for n in range(3)]
    assert store.names("shards") == ["v", "w", "x"] and store.size("shards/x") == 0
    assert reader.refresh() == 3 and reader.covers(ALL).sum() == 6


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
    with pytest.raises(CacheError, match=r"s3://no-such-bucket/x/cache.json: no such file, folder or bucket"):
        CacheWriter("s3://no-such-bucket/x", header(), writer="w")


def test_requests_that_fail_are_sent_again(s3):
    server, url = s3
    server.fail = lambda number, method, path: "503 Service Unavailable" if number % 7 == 0 else None
    write(url, list(range(6)))
    assert CacheReader(url).read(np.arange(6), digests(np.arange(6))).targets.covered_T.sum() == 6 * (S - 1)


def test_a_shard_whose_answer_was_lost_is_published_once(s3):
    """The put is done, the answer does not arrive; sent again, it finds its own shard."""
    server, url = s3
    lost = set()

    def fail(number, method, path):
        if method == "PUT" and "/shards/" in path and path not in lost:
            lost.add(path)
            return "drop"
        return None

    server.fail = fail
    write(url, list(range(6)))
    assert len(lost) == 4 and CacheReader(url).view["streams"] == {"w": 4}


@pytest.mark.parametrize("part", ["shards", "catalog"])
def test_an_upload_that_dies_leaves_nothing_to_see(s3, part, caplog):
    """Shard, listing or snapshot; the writer that comes next does it again."""
    server, url = s3
    write(url, [0, 1])
    server.fail = lambda number, method, path: "403 Forbidden" if method == "PUT" and f"/{part}/" in path else None
    if part == "shards":
        with pytest.raises(CacheError, match=f"{url}/{part}/"):
            write(url, [2, 3])
    else:
        write(url, [2, 3])
        assert f"{url}/{part}/" in caplog.text
    server.fail = lambda number, method, path: None
    there = 2 if part == "shards" else 4
    assert CacheReader(url).view == {"snapshot": 0, "streams": {"w": 1 + there // 2}}
    assert CacheReader(url).covers(np.arange(4)).sum() == there
    write(url, [2, 3])
    assert CacheReader(url).covers(np.arange(4)).all()
    assert CacheReader(url).view == {"snapshot": 1, "streams": {"w": 3}}


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
    assert copy.view == reader.view == {"snapshot": 0, "streams": {"w": 3}}
    assert copy.refresh() == 1


def test_refreshing_asks_for_one_name_a_writer(s3):
    """However many shards there are; and of a new shard its size or name, and its bytes."""
    server, url = s3
    write(url, list(range(0, 20)))
    write(url, list(range(20, 24)), writer="v")
    reader = CacheReader(url)
    folder = url.removeprefix("s3:/")

    def requests():
        """Of this cache's own files: an upload that another test broke off may still be sent again."""
        return [path for _, path in server.requests if path.startswith(folder)]

    for _ in range(2):
        server.requests.clear()
        assert reader.refresh() == 0
        asked = [path for path in requests() if "/shards/" in path]
        assert sorted(asked) == [
            f"{folder}/shards/{name}.safetensors" for name in ("v/000000/000000003", "w/000000/000000011")
        ]
        assert len(requests()) <= 5, requests()
    write(url, [30, 31])
    server.requests.clear()
    assert reader.refresh() == 1 and len(requests()) <= 16, requests()


def test_a_url_of_this_machine_is_a_path(tmp_path):
    assert isinstance(open_store(f"file://{tmp_path}"), LocalStore)
    write(f"file://{tmp_path}/c", [0, 1])
    assert CacheReader(tmp_path / "c").covers(ALL).sum() == 2
    shutil.rmtree(tmp_path / "c")
    assert not is_created(f"file://{tmp_path}/c")
