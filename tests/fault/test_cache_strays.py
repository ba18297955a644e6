"""Files under wrong names, what is no shard, and who else is there while a cache is repaired; damage at random."""

import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from distill.cache import CacheReader, CacheWriter, cataloging
from distill.cache.format import shard_name
from distill.cache.loss_curve import LossSums
from distill.cache.open_store import open_store
from distill.cache.origins import Origin
from distill.cache.publish import publish_shard
from distill.cache.shard import Columns
from distill.config.errors import CacheError
from distill.tools.commands import main
from distill.tools.repair import Repair, repair
from distill.tools.verify import verify
from tests import format_reader
from tests.cache_damage import SHARDS, STEPS, checked, files, flip, header_of, make, shard, swap
from tests.workers.cache_writers import SAMPLES, V, digests, header, put


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def cache(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.parametrize(
    "how", ["swapped", "moved on", "no suffix", "another folder", "copy beside it", "copy over the damaged one"]
)
def test_whole_shards_under_a_wrong_name(cache, whole, how):
    path = shard(cache, 2)
    match how:
        case "swapped":
            swap(path, shard(cache, 4))
        case "moved on":
            path.rename(shard(cache, 6))
        case "no suffix":
            path.rename(path.with_suffix(""))
        case "another folder":
            (cache / "shards" / "w" / "000007").mkdir()
            path.rename(cache / "shards" / "w" / "000007" / path.name)
        case "copy beside it":
            shutil.copy(path, f"{path} (copy)")
        case "copy over the damaged one":
            shutil.copy(path, path.with_name("copy"))
            flip(path, -1)
    problems, notes, *_ = verify(open_store(cache))
    named = " ".join(problems + notes)
    assert "it is shard 2 of writer w" in named and shard_name("w", 2) in named
    done = checked(cache, format_reader.cache(whole))
    assert done.lost == [] and done.unnamed == 0 and any("it is shard 2 of writer w" in line for line in done.lines)
    shards = {p.relative_to(cache): data for p, data in files(cache / "shards").items()}
    del shards[Path(shard_name("w", 6))]  # with which a writer has begun again
    assert shards == {p.relative_to(whole): data for p, data in files(whole).items() if "shards" in p.parts}


def test_another_shard_under_a_name_that_is_taken(cache, whole, tmp_path):
    """It says whose it is, and stays in quarantine."""
    with CacheWriter(tmp_path / "b", header(), writer="w", counts_V=np.arange(V) % 7) as writer:
        put(writer, [11], step=4)
    shutil.copy(shard(tmp_path / "b", 1), cache / "shards" / "w" / "000000" / "found")
    done = checked(cache, format_reader.cache(whole))
    assert "it is shard 1 of writer w, and another one is there; moved to quarantine" in done.lines[0]
    assert (cache / "quarantine" / "shards" / "w" / "000000" / "found").exists()


def test_a_shard_of_another_cache(cache, whole, tmp_path):
    with CacheWriter(tmp_path / "b", header(corpus="other"), writer="w", counts_V=np.arange(V) % 7) as writer:
        put(writer, [11], step=4)
    shutil.copy(shard(tmp_path / "b", 1), shard(cache, 1))
    (problem, *_) = verify(open_store(cache)).problems
    assert "it belongs to another cache" in problem and header_of(tmp_path / "b").identity in problem
    assert header_of(whole).identity in problem
    assert checked(cache, format_reader.cache(whole), lost=[0, 5, 9]).lost == [0, 5, 9]


STRAYS = [
    "fifo",
    "folder",
    "huge",
    "many rows",
    "empty",
    "hidden",
    "lost+found",
    "checkpoints",
    "far number",
    "broken link",
    "loop",
]


@pytest.mark.parametrize("what", STRAYS)
@pytest.mark.parametrize("is_shard", [True, False])
def test_what_is_no_shard(cache, whole, what, is_shard):
    """In a shard's place or beside it: named, in bounded memory, never waited for, never in the way of the rest."""
    path = shard(cache, 2) if is_shard else cache / "shards" / "w" / "000000" / "stray"
    path.unlink(missing_ok=True)
    match what:
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "huge":
            with path.open("wb") as file:
                file.truncate(2**43)
        case "many rows":
            data = shard(whole, 2).read_bytes()
            path.write_bytes(data.replace(b'\\"samples\\": 2,', b'\\"samples\\": %d,' % 2**60, 1))
        case "empty":
            path.touch()
        case "hidden":
            (path.parent / ".DS_Store").write_bytes(b"x")
        case "lost+found" | "checkpoints":
            folder = cache / "shards" / {"lost+found": "lost+found", "checkpoints": ".ipynb_checkpoints"}[what]
            folder.mkdir()
            (folder / "x-checkpoint.safetensors").write_bytes(b"x")
        case "far number":
            path = shard(cache, 10**12) if not is_shard else path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
        case "broken link":
            path.symlink_to("nowhere")
        case "loop":
            path.symlink_to(path.name)
    problems, notes, *_ = verify(open_store(cache))
    if is_shard:
        assert any(path.name in problem for problem in problems)
    elif what not in ("hidden", "lost+found", "checkpoints", "far number"):
        assert problems == [] and any(path.name in note for note in notes)
    done = repair(open_store(cache))
    assert done.lost == ([17, 39] if is_shard else [])
    verdict = verify(open_store(cache), decode=True)
    assert verdict.problems == [] and len(verdict.notes) == (
        what in ("hidden", "lost+found", "checkpoints") or (what == "folder" and not is_shard)
    )
    expected = format_reader.cache(whole)
    assert format_reader.cache(cache) == {s: r for s, r in expected.items() if s not in done.lost}
    assert repair(open_store(cache)) == Repair()
    CacheWriter(cache, header(), writer="w").close()


def stray(path, what):
    match what:
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "broken link" | "loop":
            path.symlink_to("nowhere" if what == "broken link" else path.name)
        case "garbage":
            path.write_bytes(b"garbage" * 999)


@pytest.mark.parametrize("what", ["fifo", "folder", "broken link", "loop", "garbage"])
@pytest.mark.parametrize("has_catalog", [True, False])
def test_what_is_in_the_way_of_a_writers_next_shard(cache, what, has_catalog, caplog):
    """What no writer can have published is no part of the cache; a file may be a damaged shard."""
    writer = CacheWriter(cache, header(), writer="v", shard_samples=1)
    put(writer, [33], step=3)
    writer.flush()
    before = CacheReader(cache)
    put(writer, [34], step=3)
    writer.flush()
    stray(shard(cache, 3, "v"), what)
    if not has_catalog:
        shutil.rmtree(cache / "catalog")
        (cache / "catalog").mkdir()
    if what == "garbage":
        for look in (before.refresh, lambda: CacheReader(cache)):
            with pytest.raises(CacheError, match=shard_name("v", 3)):
                look()
        assert before.covers([33, 34]).tolist() == [True, False]
    else:
        assert before.refresh() == 1 and before.covers([33, 34]).all()
        assert shard_name("v", 3) in caplog.text
        caplog.clear()
        assert CacheReader(cache).covers([33, 34]).all() and shard_name("v", 3) in caplog.text
        assert not before.refresh()
    with pytest.raises(CacheError, match=f"{shard_name('v', 3)}: .* no shard, and codistill-cache repair"):
        put(writer, [35], step=3)
        writer.flush()
    writer.close()
    with pytest.raises(CacheError, match=shard_name("v", 3)):
        CacheWriter(cache, header(), writer="v")
    assert main(["repair", str(cache)]) == 1 and verify(open_store(cache))[:2] == ([], [])
    with CacheWriter(cache, header(), writer="v") as writer:
        put(writer, [35], step=3)
    assert CacheReader(cache).covers([33, 34, 35]).all()


@pytest.mark.parametrize("what", ["fifo", "folder", "broken link", "loop"])
def test_what_is_in_a_locks_place(cache, what, capsys):
    path = cache / "locks" / "w.lock"
    path.unlink()
    stray(path, what)
    with pytest.raises(CacheError, match=r"locks/w\.lock: not a file"):
        CacheWriter(cache, header(), writer="w")
    assert main(["verify", str(cache)]) == 0 and "locks/w.lock: expected a lock file" in capsys.readouterr().out
    flip(shard(cache, 2), -1)
    assert main(["repair", str(cache)]) == 1 and repair(open_store(cache)) == Repair()
    assert verify(open_store(cache))[:2] == ([], [])
    CacheWriter(cache, header(), writer="w").close()


# ------------------------------------------------------------ what cannot be done, and who else is there


@pytest.mark.parametrize("name", ["cache.json", "ranks-*.safetensors"])
def test_what_cannot_be_made_again_is_refused_in_plain_words(cache, whole, name, capsys):
    (path,) = cache.glob(name)
    flip(path, 30)
    before = files(cache)
    assert main(["repair", str(cache)]) == 2
    printed = capsys.readouterr().err
    assert path.name in printed and "copy them from there" in printed
    path.unlink()
    assert main(["repair", str(cache)]) == 2
    path.write_bytes(before[path])
    assert files(cache) == before
    # As the message says: the same job begun elsewhere writes the same bytes.
    CacheWriter(cache.parent / "again", header(), writer="other", counts_V=np.arange(V) % 7).close()
    assert next((cache.parent / "again").glob(name)).read_bytes() == next(whole.glob(name)).read_bytes()


def test_live_writers_are_left_alone(cache, whole, capsys):
    with CacheWriter(cache, header(), writer="live") as writer:
        put(writer, [33], step=3)
        writer.flush()
        stray = shard(cache, 2, "live").with_suffix(".safetensors.1-ab.tmp")
        stray.write_bytes(b"being written")
        flip(shard(cache, 2), -1)
        assert verify(open_store(cache)).notes == []
        done = repair(open_store(cache))
        assert done.lost == [39] and stray.exists()
        put(writer, [34], step=3)
        writer.flush()
        flip(shard(cache, 2, "live"), -1)
        assert main(["repair", str(cache)]) == 1
        assert "left alone, since its writer is alive" in capsys.readouterr().out
        flip(shard(cache, 2, "live"), -1)
    assert stray.exists() and repair(open_store(cache)).lost == []
    assert verify(open_store(cache))[:2] == ([], []) and not stray.exists()
    assert set(format_reader.cache(cache)) == (set(format_reader.cache(whole)) | {33, 34}) - {39}


def test_tools_and_writers_exclude_each_other(cache, monkeypatch):
    from distill.tools.common import alone

    with alone(open_store(cache)):
        with pytest.raises(CacheError, match="holds the cache for a tool"):
            repair(open_store(cache))
        assert main(["repair", "--dry-run", str(cache)]) == 2
    flip(shard(cache, 2), -1)
    real, refused = cataloging.update, []

    def during(*args, **kwargs):
        with pytest.raises(CacheError, match="holds the writer's name 'w'"):
            CacheWriter(cache, header(), writer="w")
        refused.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(cataloging, "update", during)
    repair(open_store(cache))
    assert refused


def test_a_file_that_may_not_be_read_is_not_damage(cache, monkeypatch):
    """Another user's repair would move all of it away."""
    real = os.open

    def guarded(path, flags, *args, **kwargs):
        if str(path).endswith("000000002.safetensors"):
            raise PermissionError(13, "Permission denied")
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", guarded)
    with pytest.raises(CacheError, match=r"000000002\.safetensors: Permission denied"):
        repair(open_store(cache))
    assert "Permission denied" in verify(open_store(cache)).problems[0] and not (cache / "quarantine").exists()


def test_what_a_record_is_is_checked_when_it_is_decoded(cache):
    """Bytes that verify and are no record: only `--decode` looks so far."""
    one = np.ones(1, np.int64)
    columns = Columns(11 * one, digests([11]), 0 * one, 900_000 * one, 0 * one)
    origin = Origin("t", "capture", 0, 0, 1, 15, 0, 1.0, False, 0.0)
    identity = header_of(cache).identity
    publish_shard(
        open_store(cache), identity, "odd", 0, "capture", columns, np.zeros(9, np.uint8), 9 * one, (origin,), LossSums()
    )
    assert verify(open_store(cache)).problems == []
    (problem,) = verify(open_store(cache), decode=True).problems
    assert "sample 11 does not verify, or is not a record" in problem


@pytest.mark.parametrize("seed", range(25))
def test_any_damage_at_all(whole, tmp_path, seed):
    """Bits flipped, files cut, zeros, files swapped or gone, outside of header and ranks: what is left after a repair
    is what was there, and nothing else; what is gone was reported."""
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    rng = random.Random(seed)
    if rng.random() < 0.3:
        shutil.rmtree(folder / "catalog")
    for _ in range(rng.randint(1, 4)):
        paths = sorted([*(folder / "shards").rglob("*.safetensors"), *folder.glob("catalog/*")])
        path, size = rng.choice(paths), 0
        size = path.stat().st_size
        match rng.choice(["flip", "flip", "cut", "zeros", "tail", "swap", "gone"]):
            case "flip" if size:
                flip(path, rng.randrange(size), rng.randrange(8))
            case "cut":
                path.write_bytes(path.read_bytes()[: rng.randrange(size + 1)])
            case "zeros":
                at, data = rng.randrange(size + 1), path.read_bytes()
                path.write_bytes((data[:at] + bytes(512) + data[at + 512 :])[:size])
            case "tail":
                path.write_bytes(path.read_bytes() + bytes(rng.randrange(1, 5000)))
            case "swap":
                swap(path, rng.choice(paths))
            case "gone":
                path.unlink()
    before = format_reader.cache(whole)
    done = repair(open_store(folder))
    assert verify(open_store(folder), decode=True).problems == []
    after = format_reader.cache(folder)
    changed = {sample for sample, record in before.items() if after.get(sample) != record}
    assert done.unnamed or changed == set(done.lost)
    assert set(after) <= set(before) and changed & set(after) <= {3}  # of which there is an older record
    assert repair(open_store(folder)) == Repair()
    assert CacheReader(folder).covers(np.arange(SAMPLES)).sum() == len(after)
    CacheWriter(folder, header(), writer="w").close()


def test_on_an_object_store():
    url = "memory://repair/cache"
    with CacheWriter(url, header(), writer="w", shard_samples=99) as writer:
        for ids, step in zip(SHARDS, STEPS):
            put(writer, ids, step=step)
            writer.flush()
        writer.finish()
    store = open_store(url)
    name = shard_name("w", 1)
    data = store.read(name)
    store.publish(name, data[:-1] + bytes([data[-1] ^ 1]))
    two, three = shard_name("w", 2), shard_name("w", 3)
    there = store.read(two), store.read(three)
    store.publish(two, there[1])
    store.publish(three, there[0])
    store.remove(shard_name("w", 5))
    assert len(verify(store).problems) >= 4
    done = repair(open_store(url))
    assert done.lost == [9] and verify(open_store(url), decode=True)[:2] == ([], [])
    assert (store.read(two), store.read(three)) == there and CacheReader(url).finished
    assert sorted(s.sample_id for s in CacheReader(url).samples()) == [0, 3, 5, 17, 20, 21, 22, 30, 39]
    assert store.read(f"quarantine/{name}") != data
