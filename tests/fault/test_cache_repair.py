"""Damage of every kind: `verify` names it, `repair` keeps all that is good and reports what is not, readers go on."""

import json
import random
import shutil

import numpy as np
import pytest

from distill.cache import CacheReader, CacheWriter, cataloging
from distill.cache.format import shard_name
from distill.cache.open_store import open_store
from distill.cache.shard import read_front
from distill.tools.commands import main
from distill.tools.compact import compact
from distill.tools.repair import Repair, repair
from distill.tools.verify import verify
from tests import format_reader
from tests.cache_damage import (
    checked,
    files,
    flip,
    header_of,
    losses_of,
    make,
    place_of,
    shard,
)
from tests.workers.cache_writers import header, put


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def cache(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "cache")
    return tmp_path / "cache"


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


@pytest.mark.parametrize("column", ["steps", "origins", "atoms", "checks", "digests", "sample_ids"])
@pytest.mark.parametrize("has_catalog", [True, False])
def test_a_damaged_index(cache, whole, column, has_catalog):
    """Nothing is lost that the catalog has; without it a record is known by its check."""
    path = shard(cache, 1)
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


@pytest.mark.parametrize(
    "what, expected",
    [
        ("step", "other records than the shards of 1 samples, 5 the first"),
        ("less", "other records than the shards of 1 samples, 5 the first"),
        ("more", "1 records that no shard has"),
        ("origin", "other records than the shards of 3 samples, 0 the first"),
    ],
)
def test_listings_that_disagree_with_the_shards(cache, whole, monkeypatch, what, expected):
    """Every digest verifies, one entry or origin is another one."""
    real = cataloging.EntryTable.of_shards.__func__

    def wrong(cls, shards):
        table = real(cls, shards)
        match what:
            case "step":
                table.entries["step"][2] += 1
            case "less":
                table.entries = np.delete(table.entries, 2)
            case "more":
                table.entries = np.append(table.entries, table.entries[-1:])
                table.entries["sample"][-1] += 1
            case "origin":
                table.origins["tokens"][0] += 1
        return table

    shutil.rmtree(cache / "catalog")
    monkeypatch.setattr(cataloging.EntryTable, "of_shards", classmethod(wrong))
    cataloging.update(open_store(cache), header_of(whole))
    monkeypatch.undo()
    (problem,) = verify(open_store(cache)).problems
    assert expected in problem
    checked(cache, format_reader.cache(whole))


def test_a_kill_between_a_shard_and_the_catalog(cache, whole, monkeypatch):
    """The listing still has the damaged shard; what comes next finds that, and finishes."""
    flip(shard(cache, 1), place_of(shard(cache, 1), "records")[0])
    with monkeypatch.context() as patch:
        patch.setattr(cataloging, "update", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            repair(open_store(cache))
    assert "other records than the shards of" in " ".join(verify(open_store(cache)).problems)
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
