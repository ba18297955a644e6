"""Damage of every kind: `verify` names it, `repair` keeps all that is good and reports what is not, readers go on."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from distill.cache import CacheReader, CacheWriter, catalog
from distill.cache.format import shard_name
from distill.cache.loss_curve import LossSums
from distill.cache.open_store import open_store
from distill.cache.origins import Origin
from distill.cache.publish import publish_shard
from distill.cache.shard import Columns, read_front
from distill.config.errors import CacheError
from distill.tools.commands import main
from distill.tools.compact import compact
from distill.tools.repair import Repair, repair
from distill.tools.verify import verify
from tests import format_reader
from tests.workers.cache_writers import SAMPLES, V, digests, header, put

SHARDS = [[0, 3, 5, 9], [17, 39], [20, 21, 22], [3, 30]]
"""Behind a begin mark, numbers 1 to 4. Sample 3 is made again at step 7."""
STEPS = [0, 1, 2, 7]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with CacheWriter(folder, header(), writer="w", counts_V=np.arange(V) % 7, shard_samples=99) as writer:
        for ids, step in zip(SHARDS, STEPS):
            put(writer, ids, step=step)
            writer.flush()
        writer.finish()
    return folder


@pytest.fixture
def cache(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "cache")
    return tmp_path / "cache"


def shard(folder, seq, writer="w"):
    return folder / shard_name(writer, seq)


def files(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"}


def flip(path, place, bit=0):
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def place_of(path, column):
    """Where a column lies in a shard's file."""
    data = path.read_bytes()
    front = 8 + int.from_bytes(data[:8], "little")
    return [front + offset for offset in json.loads(data[8:front])[column]["data_offsets"]]


def reports(folder):
    return [json.loads(p.read_bytes()) for p in sorted((folder / "quarantine").glob("repair-*.json"))]


def checked(folder, expected, lost=()):
    """After a repair: no damage, all but what is lost is as it was, also by the catalog, and another finds nothing."""
    dry = repair(open_store(folder), dry_run=True)
    done = repair(open_store(folder))
    assert dry == done
    assert verify(open_store(folder), decode=True)[:2] == ([], [])
    assert format_reader.cache(folder) == {s: record for s, record in expected.items() if s not in lost}
    assert format_reader.catalog(folder) == format_reader.newest(folder)
    reader = CacheReader(folder)
    ids = np.array(sorted(set(expected) - set(lost)))
    assert reader.read(ids, digests(ids)).targets.covered_T.any()
    if done.lines:
        assert reports(folder)[-1]["lines"] == done.lines and reports(folder)[-1]["lost"] == done.lost
    again = repair(open_store(folder))
    assert again == Repair() and not list((folder / "quarantine").glob("*.unfinished"))
    CacheWriter(folder, header(), writer="w").close()
    return done


def test_a_whole_cache_is_whole(cache):
    size = sum(p.stat().st_size for p in (cache / "shards").rglob("*.safetensors"))
    assert verify(open_store(cache), decode=True, jobs=3) == ([], [], 4, 11, size)
    before = files(cache)
    assert repair(open_store(cache)) == Repair()
    assert files(cache) == before and not (cache / "quarantine").exists()


@pytest.mark.parametrize(
    "name", ["cache.json", "ranks-*.safetensors", "catalog/*.json", "catalog/*.listing", *(
        shard_name("w", seq) for seq in range(6))]
)  # fmt: skip
def test_verify_finds_every_flipped_bit_and_names_the_file(cache, name):
    (path,) = cache.glob(name)
    data = path.read_bytes()
    rng = random.Random(name)
    for place in [0, 1, 7, 8, len(data) - 2, len(data) - 1] + [rng.randrange(len(data)) for _ in range(40)]:
        flip(path, place, bit := rng.randrange(8))
        problems = verify(open_store(cache)).problems
        assert problems and path.name in problems[0], place
        flip(path, place, bit)
    path.write_bytes(data + bytes(100))
    assert path.name in verify(open_store(cache)).problems[0]
    path.write_bytes(data)
    assert verify(open_store(cache)).problems == []


def test_damage_of_single_records(cache, whole, capsys):
    """The others are kept; the lost ones are named, and of sample 3 the later record is elsewhere."""
    expected = format_reader.cache(whole)
    path = shard(cache, 1)
    data = path.read_bytes()
    ends = np.frombuffer(data[slice(*place_of(path, "ends"))], np.uint32)
    first, _ = place_of(path, "records")
    flip(path, first + int(ends[0]) - 1)  # sample 0
    flip(path, first + int(ends[1]) - 1)  # sample 3
    damaged = path.read_bytes()
    assert main(["verify", str(cache)]) == 1
    printed = capsys.readouterr().out
    assert f"{path} is damaged: sample 0" in printed and "sample 3" in printed and "sample 5" not in printed
    before = files(cache)
    assert main(["repair", "--dry-run", str(cache)]) == 1
    assert files(cache) == before
    done = checked(cache, expected, lost=[0])
    assert done.lost == done.uncovered == [0] and done.saved == 2
    assert "samples 0, 3 are damaged; 2 records are kept" in done.lines[0]
    assert (cache / "quarantine" / shard_name("w", 1)).read_bytes() == damaged
    assert read_front(open_store(cache), header_of(cache), "w", 1).header.losses == losses_of(data)


def header_of(folder):
    return CacheReader(folder).header


def losses_of(data):
    front = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return LossSums.of(json.loads(front["__metadata__"]["shard"])["losses"])


def test_the_exit_code_and_the_last_lines_name_what_is_lost(cache, capsys):
    flip(shard(cache, 2), -1)
    assert main(["repair", str(cache)]) == 1
    printed = capsys.readouterr().out
    assert "lost: newest records of 1 samples: 39" in printed and "quarantine/repair-000000.json" in printed
    assert main(["repair", str(cache)]) == 0


def test_an_older_record_takes_the_place_of_a_lost_one(cache, whole, capsys):
    path = shard(cache, 4)
    first, _ = place_of(path, "records")
    path.write_bytes(path.read_bytes()[:first])  # both records of shard 4
    assert main(["repair", str(cache)]) == 1
    assert "of these an older record is left: 3" in capsys.readouterr().out
    assert verify(open_store(cache))[:2] == ([], [])
    found = format_reader.cache(cache)
    assert found[3][0] == 0 and 30 not in found and sorted(set(format_reader.cache(whole)) - set(found)) == [30]


@pytest.mark.parametrize("left, lost", [(0.0, [17, 39]), (0.05, [17, 39]), (-1, [39]), (1.0, [17, 39])])
@pytest.mark.parametrize("has_catalog", [True, False])
def test_truncated_and_missing_shards(cache, whole, left, lost, has_catalog):
    """What was lost is known from the catalog; without one a front that is gone leaves nothing to name."""
    path = shard(cache, 2)
    data = path.read_bytes()
    path.write_bytes(data[: int(left * len(data)) if left >= 0 else -1])
    if left == 1.0:
        path.unlink()
    if not has_catalog:
        shutil.rmtree(cache / "catalog")
    assert path.name in verify(open_store(cache)).problems[0]
    done = checked(cache, format_reader.cache(whole), lost)
    assert path.name in done.lines[0]
    assert (done.lost, done.unnamed) == (lost, 0) if has_catalog or len(lost) == 1 else ([], 1)


@pytest.mark.parametrize("column", ["steps", "origins", "atoms", "checks", "digests", "sample_ids", "front"])
@pytest.mark.parametrize("has_catalog", [True, False])
def test_a_damaged_index_or_header(cache, whole, column, has_catalog):
    """Nothing is lost that the catalog has; without it a record is known by its check, and a front by its digest."""
    path = shard(cache, 1)
    if column == "front":
        flip(path, 200)
    else:
        first, end = place_of(path, column)
        flip(path, first + 2 * (end - first) // 4)  # of the third sample, 5
    if not has_catalog:
        shutil.rmtree(cache / "catalog")
    assert path.name in verify(open_store(cache)).problems[0]
    lost = [5] if not has_catalog and column in ("atoms", "checks", "digests", "sample_ids") else []
    done = checked(cache, format_reader.cache(whole), lost)
    assert done.lost == [] and done.unnamed == len(lost)  # an index that does not verify names nobody
    assert read_front(open_store(cache), header_of(cache), "w", 1).header.losses == losses_of(
        shard(whole, 1).read_bytes()
    )


def test_a_front_that_is_gone(cache, whole):
    """A block of zeros over header and index: the catalog has both, and the losses are those of the records."""
    path = shard(cache, 1)
    first, _ = place_of(path, "records")
    path.write_bytes(bytes(first) + path.read_bytes()[first:])
    done = checked(cache, format_reader.cache(whole))
    assert done.lost == [] and done.saved == 3  # of sample 3 the catalog lists the later record alone
    (row,) = read_front(open_store(cache), header_of(cache), "w", 1).header.losses.json()
    assert row[:4] == ["t", "capture", 0, 45]


@pytest.mark.parametrize("seq", [0, 5])
@pytest.mark.parametrize("how", ["flip", "tail", "cut", "delete"])
@pytest.mark.parametrize("has_catalog", [True, False])
def test_marks_hold_no_records(cache, whole, seq, how, has_catalog):
    """One is put back, where something says that it was there, and no loss is reported."""
    path = shard(cache, seq)
    data = path.read_bytes()
    if not has_catalog:
        shutil.rmtree(cache / "catalog")
    if how == "flip":
        flip(path, 300)
    elif how == "delete":
        path.unlink()
    else:
        path.write_bytes(data + bytes(50) if how == "tail" else data[:-50])
    done = repair(open_store(cache))
    assert verify(open_store(cache))[:2] == ([], []) and format_reader.cache(cache) == format_reader.cache(whole)
    if (how, has_catalog) == ("delete", False):
        assert done.unnamed == (seq == 0) and CacheReader(cache).finished == (seq == 0)
    else:
        assert done.lost == [] and done.unnamed == 0 and CacheReader(cache).finished
        assert seq == 0 or path.read_bytes() == data


def test_the_stream_goes_on_after_a_lost_shard(cache):
    """Numbers stay taken, so that views which checkpoints pin stay what they were."""
    view = CacheReader(cache).view
    shard(cache, 5).unlink()
    shard(cache, 4).unlink()
    done = checked(cache, format_reader.cache(cache))
    assert done.lost == [3, 30] and done.uncovered == [30]
    with CacheWriter(cache, header(), writer="w") as writer:
        put(writer, [30], step=9)
        writer.finish()
    reader = CacheReader(cache)
    assert reader.covers(np.array([30])).all() and not CacheReader(cache, view).covers(np.array([30])).any()


# ------------------------------------------------------------ names


def swap(one, two):
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b)
    two.write_bytes(a)


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


# ------------------------------------------------------------ catalog


@pytest.mark.parametrize("name", ["*.json", "*.listing", "*"])
@pytest.mark.parametrize("how", ["flip", "cut", "folder", "delete"])
def test_a_damaged_catalog_is_made_again(cache, whole, name, how):
    view = CacheReader(cache).view
    for path in list((cache / "catalog").glob(name)):
        match how:
            case "flip":
                flip(path, 70)
            case "cut":
                path.write_bytes(path.read_bytes()[:-1])
            case "folder" | "delete":
                path.unlink()
                if how == "folder":
                    path.mkdir()
    is_lost = how == "delete" and name != "*.listing"  # a catalog that is not there is no damage
    assert bool(verify(open_store(cache)).problems) != is_lost
    done = repair(open_store(cache))
    verdict = verify(open_store(cache))
    assert verdict.problems == [] and done.lost == [] and done.unnamed == 0
    assert format_reader.cache(cache) == format_reader.cache(whole)
    assert (name != "*.listing" and how == "delete") or format_reader.catalog(cache) == format_reader.newest(cache)
    assert CacheReader(cache, view).covers(np.array([0, 39])).all()


def test_listings_that_disagree_with_the_shards(cache, whole, monkeypatch):
    """Every digest verifies, one entry is another one."""
    real = catalog.EntryTable.of_shards.__func__

    def wrong(cls, shards):
        table = real(cls, shards)
        table.entries["step"][2] += 1
        return table

    shutil.rmtree(cache / "catalog")
    monkeypatch.setattr(catalog.EntryTable, "of_shards", classmethod(wrong))
    catalog.update(open_store(cache), header_of(whole))
    monkeypatch.undo()
    (problem,) = verify(open_store(cache)).problems
    assert "other records than the shards of 1 samples, 5 the first" in problem


def test_a_kill_between_a_shard_and_the_catalog(cache, whole, monkeypatch):
    """The listing still has the damaged shard; what comes next finds that, and finishes."""
    flip(shard(cache, 1), place_of(shard(cache, 1), "records")[0])
    with monkeypatch.context() as patch:
        patch.setattr(catalog, "update", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            repair(open_store(cache))
    assert "has other records of" in " ".join(verify(open_store(cache)).problems)
    (left,) = (cache / "quarantine").glob("*.unfinished")
    assert json.loads(left.read_bytes())["lost"] == [0]
    done = checked(cache, format_reader.cache(whole), lost=[0])
    assert done.lost == [0] and "sample" in done.lines[0]


# ------------------------------------------------------------ compaction


def test_damage_after_a_compaction(cache, whole):
    """Its records keep their own origins, counted again; sums of the losses stay."""
    compact(open_store(cache), shard_bytes=10**6, purge_age=0)
    losses = CacheReader(cache).losses
    path = shard(cache, 0, "compact")
    flip(path, place_of(path, "records")[0] + 3)  # the first record: sample 0, step 0
    done = checked(cache, format_reader.cache(whole), lost=[0])
    assert done.lost == [0] and done.saved == 9 and CacheReader(cache).losses == losses
    origins = {
        s.sample_id: (s.step, s.origin.first_step, s.origin.samples, s.origin.tokens)
        for s in CacheReader(cache).samples()
    }
    assert origins[5] == (0, 0, 2, 30) and origins[39] == (1, 1, 2, 30) and origins[30] == (7, 7, 2, 30)


@pytest.mark.parametrize("damage", ["record", "front", "file"])
def test_what_a_damaged_shard_had_replaced_counts_again(cache, whole, damage):
    """As long as it is there: then nothing is lost, and no loss is summed twice."""
    compact(open_store(cache), shard_bytes=10**6)
    losses = CacheReader(cache).losses
    path = shard(cache, 0, "compact")
    if damage == "record":
        flip(path, place_of(path, "records")[0] + 3)
    elif damage == "front":
        path.write_bytes(bytes(3000) + path.read_bytes()[3000:])
    else:
        path.write_bytes(b"")
    done = checked(cache, format_reader.cache(whole))
    assert done.lost == [] and done.unnamed == 0
    assert damage == "front" or CacheReader(cache).losses == losses


@pytest.mark.parametrize("damage", ["front", "file"])
def test_a_compacted_shard_whose_sources_are_gone(cache, whole, damage):
    compact(open_store(cache), shard_bytes=10**6, purge_age=0)
    path = shard(cache, 0, "compact")
    first, _ = place_of(path, "records")
    path.write_bytes(bytes(first) + path.read_bytes()[first:] if damage == "front" else b"")
    if damage == "front":
        assert checked(cache, format_reader.cache(whole)).lost == []
    else:
        done = repair(open_store(cache))
        assert done.lost == sorted(format_reader.cache(whole)) and verify(open_store(cache))[:2] == ([], [])
        CacheWriter(cache, header(), writer="w").close()


def test_replaced_shards_that_wait_for_a_purge_are_verified_and_repaired(cache, whole):
    view = CacheReader(cache).view
    compact(open_store(cache), shard_bytes=10**6)
    assert "are replaced by others" in " ".join(verify(open_store(cache)).notes)
    flip(shard(cache, 2), -1)
    assert "sample 39 does not verify" in verify(open_store(cache)).problems[0]
    assert repair(open_store(cache)).lost == []
    verdict = verify(open_store(cache))
    assert verdict.problems == [] and format_reader.cache(cache) == format_reader.cache(whole)
    pinned = CacheReader(cache, view)
    assert pinned.covers(np.array([17, 39])).tolist() == [True, False]


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
    real, refused = catalog.update, []

    def during(*args, **kwargs):
        with pytest.raises(CacheError, match="holds the writer's name 'w'"):
            CacheWriter(cache, header(), writer="w")
        refused.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(catalog, "update", during)
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
