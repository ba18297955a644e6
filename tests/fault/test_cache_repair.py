"""Damage of every kind: `verify` names it, `repair` keeps all that is good and says what is not, readers go on."""

import json
import random
import shutil

import numpy as np
import pytest

from distill.cache import CacheReader, CacheWriter
from distill.cache.ledger import ledgers
from distill.cache.open_store import open_store
from distill.cache.seal import seal
from distill.config.errors import CacheError
from distill.tools.commands import main
from distill.tools.compact import compact
from distill.tools.repair import repair
from distill.tools.verify import verify
from tests import format_reader
from tests.workers.cache_writers import SAMPLES, V, digests, header, put

SHARDS = [[0, 3, 5, 9], [17, 39], [20, 21, 22], [3, 30]]
"""Sample 3 is made again at step 7."""
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


def shard(folder, number):
    (path,) = (folder / "shards").glob(f"w-{number:06d}-*.safetensors")
    return path


def flip(path, place, bit=0):
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def place_of(path, column):
    """Where a column lies in a shard's file."""
    data = path.read_bytes()
    front = 8 + int.from_bytes(data[:8], "little")
    return [front + offset for offset in json.loads(data[8:front])[column]["data_offsets"]]


def checked(folder, expected, lost=()):
    """After a repair: nothing to complain of, and everything but what is lost says what it said; twice is once."""
    done = repair(open_store(folder))
    assert verify(open_store(folder), decode=True)[:2] == ([], [])
    assert format_reader.cache(folder) == {s: record for s, record in expected.items() if s not in lost}
    reader = CacheReader(folder)
    ids = np.array(sorted(set(expected) - set(lost)))
    assert reader.read(ids, digests(ids)).targets.covered_T.any()
    for row in reader.rows:
        assert sum(origin.samples for origin in row.origins) == row.samples
    again = repair(open_store(folder))
    assert again.lines == [] and again.saved == 0
    CacheWriter(folder, header(), writer="w").close()
    return done


def test_a_whole_cache_is_whole(cache, whole):
    assert verify(open_store(cache), decode=True, jobs=3) == (
        [],
        [],
        4,
        11,
        sum(p.stat().st_size for p in (cache / "shards").iterdir()),
    )
    before = {p: p.read_bytes() for p in cache.rglob("*") if p.is_file()}
    assert repair(open_store(cache)).lines == []
    after = {
        p: p.read_bytes() for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock" and ".tools" not in p.name
    }
    assert after == {p: data for p, data in before.items() if p.suffix != ".lock"}


@pytest.mark.parametrize(
    "name", ["cache.json", "ranks-*.safetensors", "ledger/w.jsonl", "shards/w-000000-*.safetensors"]
)
def test_verify_finds_every_flipped_bit_and_names_the_file(cache, name):
    (path,) = cache.glob(name)
    data = path.read_bytes()
    rng = random.Random(name)
    for place in [0, 1, 7, 8, len(data) - 2, len(data) - 1] + [rng.randrange(len(data)) for _ in range(40)]:
        flip(path, place, bit := rng.randrange(8))
        problems = verify(open_store(cache)).problems
        assert problems and path.name in problems[0], place
        flip(path, place, bit)
    assert verify(open_store(cache)).problems == []


def test_damage_of_single_records(cache, whole, capsys):
    """The others are copied; the lost ones are named, and of sample 3 the later record is elsewhere."""
    expected = format_reader.cache(whole)
    path = shard(cache, 0)
    ends = [place_of(path, "records")[0] + int(e) for e in np.frombuffer(
        path.read_bytes()[slice(*place_of(path, "ends"))], np.uint32)]  # fmt: skip
    flip(path, ends[0] - 1)  # sample 0
    flip(path, ends[1] - 1)  # sample 3
    assert main(["verify", str(cache)]) == 1
    said = capsys.readouterr().out
    assert f"{path} is damaged: sample 0" in said and "sample 3" in said and "sample 5" not in said
    dry = repair(open_store(cache), dry_run=True)
    assert verify(open_store(cache)).problems and not (cache / "quarantine").exists()
    done = checked(cache, expected, lost=[0])
    assert dry == done and done.lost == done.uncovered == [0] and done.saved == 2
    assert "samples 0, 3 are damaged; 2 records copied" in done.lines[0]
    assert [p.name for p in (cache / "quarantine").iterdir()] == [path.name]


def test_records_that_are_superseded_are_not_copied(cache, whole):
    flip(shard(cache, 0), place_of(shard(cache, 0), "records")[0])  # sample 0, beside 3, 5 and 9
    assert checked(cache, format_reader.cache(whole), lost=[0]).saved == 2


def test_an_older_record_takes_the_place_of_a_lost_one(cache, whole):
    path = shard(cache, 3)
    first, _ = place_of(path, "records")
    path.write_bytes(path.read_bytes()[:first])  # both records of shard 3
    store = open_store(cache)
    assert main(["repair", str(cache)]) == 0
    assert verify(store)[:2] == ([], [])
    found = format_reader.cache(cache)
    assert found[3][0] == 0 and 30 not in found and sorted(set(format_reader.cache(whole)) - set(found)) == [30]


@pytest.mark.parametrize("left, lost", [(0.0, [17, 39]), (0.05, [17, 39]), (-1, [39]), (1.0, [17, 39])])
def test_truncated_and_missing_shards(cache, whole, left, lost):
    path = shard(cache, 1)
    data = path.read_bytes()
    path.write_bytes(data[: int(left * len(data)) if left >= 0 else -1])
    if left == 1.0:
        path.unlink()
    done = checked(cache, format_reader.cache(whole), lost)
    assert len(done.lines) == 1 and path.name in done.lines[0]
    if len(lost) == 2:
        assert "2 among samples 17 to 39" in done.lines[0]
    else:
        assert done.lost == [39]


@pytest.mark.parametrize(
    "column, lost",
    [("steps", []), ("origins", []), ("atoms", [5]), ("checks", [5]), ("digests", [5]), ("sample_ids", [5])],
)
def test_a_damaged_index_costs_what_it_made_uncertain(cache, whole, column, lost):
    path = shard(cache, 0)
    first, end = place_of(path, column)
    flip(path, first + 2 * (end - first) // 4)  # of the third sample, 5
    assert path.name in verify(open_store(cache)).problems[0]
    checked(cache, format_reader.cache(whole), lost)


def test_a_torn_row_and_leftovers(cache, whole):
    """What a kill leaves is no damage; a repair tidies it up, and a shard without a row is published after all."""
    expected = format_reader.cache(whole)
    ledger = cache / "ledger" / "w.jsonl"
    *rows, _ = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(rows[:3]) + rows[3][:50])
    (cache / "shards" / "w-000004-0000000000000000.safetensors.tmp").write_bytes(b"x")
    (cache / "shards" / "w-000003-0000000000000000.safetensors").write_bytes(b"y" * 50)
    problems, notes, *_ = verify(open_store(cache))
    assert problems == [] and len(notes) == 4 and "50 bytes of a row" in notes[0]
    done = checked(cache, expected)
    assert done.lost == [] and "row 3 is made again from w-000003" in done.lines[1]
    assert "a torn last row of 50 bytes is removed" in done.lines[0]
    assert sorted(p.name[:8] for p in (cache / "shards").iterdir()) == [f"w-{number:06d}" for number in range(4)]
    assert [p.name for p in (cache / "quarantine").iterdir()] == ["w-000003-0000000000000000.safetensors"]


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("how", ["flip", "newline", "delete"])
def test_damaged_and_missing_rows_are_made_again(cache, whole, number, how):
    """From the shard's own file, byte for byte; checkpoints' views stay valid."""
    ledger = cache / "ledger" / "w.jsonl"
    original = ledger.read_bytes()
    rows = original.splitlines(keepends=True)
    view = CacheReader(cache).view
    if how == "flip":
        rows[number] = rows[number][:60] + bytes([rows[number][60] ^ 1]) + rows[number][61:]
    elif how == "newline":
        rows[number] = rows[number][:-1] + b"\v"
    else:
        del rows[number]
    ledger.write_bytes(b"".join(rows))
    assert verify(open_store(cache)).problems and "w" in verify(open_store(cache)).problems[0]
    with pytest.raises(CacheError):
        CacheReader(cache)
    done = checked(cache, format_reader.cache(whole))
    assert ledger.read_bytes() == original and done.lost == []
    assert any(f"row {number} is {'whole' if how == 'newline' else 'made again'}" in line for line in done.lines)
    assert len(CacheReader(cache, view).rows) == 4
    assert [p.name for p in (cache / "quarantine").iterdir()] == ["ledger-w.jsonl"]


def test_a_row_whose_shard_is_gone_too(cache, whole):
    """Its number stays taken, so that pinned views count right."""
    view = CacheReader(cache).view
    flip(cache / "ledger" / "w.jsonl", 100)
    shard(cache, 0).unlink()
    done = checked(cache, format_reader.cache(whole), lost=[0, 5, 9])
    assert "row 0 cannot be made again; an empty row takes its place" in "\n".join(done.lines)
    assert len(CacheReader(cache, view).rows) == 3


def test_a_damaged_last_row(cache, whole):
    """A closing row is put back, and so is a shard's."""
    expected, ledger = format_reader.cache(whole), cache / "ledger" / "w.jsonl"
    original = ledger.read_bytes()
    flip(ledger, len(original) - 30)
    checked(cache, expected)
    assert ledger.read_bytes() == original and CacheReader(cache).finished
    ledger.write_bytes(b"".join(original.splitlines(keepends=True)[:4]))
    flip(ledger, ledger.stat().st_size - 30)
    checked(cache, expected)
    assert ledger.read_bytes() == b"".join(original.splitlines(keepends=True)[:4])


def test_a_ledger_that_lost_its_end(cache, whole):
    """More shards than a kill explains: their rows are made again, byte for byte."""
    ledger = cache / "ledger" / "w.jsonl"
    rows = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(rows[0])
    problems = verify(open_store(cache)).problems
    assert len(problems) == 2 and "the ledger of w ends before its row 2" in problems[0]
    checked(cache, format_reader.cache(whole))
    assert ledger.read_bytes() == b"".join(rows[:4])


def test_a_lost_ledger(cache, whole):
    """Its rows are made again from the shards, around one whose shard is lost, too."""
    shard(cache, 1).unlink()
    ledger = cache / "ledger" / "w.jsonl"
    rows = ledger.read_bytes().splitlines(keepends=True)
    ledger.unlink()
    assert verify(open_store(cache)).problems
    checked(cache, format_reader.cache(whole), lost=[17, 39])
    found = ledger.read_bytes().splitlines(keepends=True)
    assert found[:1] + found[2:] == rows[:1] + rows[2:4] and b"finish" in found[1]


def test_what_a_record_says_is_checked_when_it_is_decoded(cache):
    """Bytes that verify and are no record: only `--decode` looks so far."""
    from distill.cache.ledger import LedgerWriter
    from distill.cache.publish import publish_shard
    from distill.cache.shard import Columns

    reader = CacheReader(cache)
    ledger = LedgerWriter(open_store(cache), "odd", reader.header.identity)
    origin = reader.rows[0].origins[0].__class__(**vars(reader.rows[0].origins[0]) | {"samples": 1, "tokens": 15})
    one = np.ones(1, np.int64)
    columns = Columns(11 * one, digests([11]), 0 * one, 900_000 * one, 0 * one)
    publish_shard(open_store(cache), ledger, "capture", columns, np.zeros(9, np.uint8), 9 * one, (origin,))
    assert verify(open_store(cache)).problems == []
    (problem,) = verify(open_store(cache), decode=True).problems
    assert "sample 11 verifies and is not a record" in problem


@pytest.mark.parametrize("name", ["cache.json", "ranks-*.safetensors"])
def test_what_cannot_be_made_again_is_refused_in_plain_words(cache, whole, name, capsys):
    (path,) = cache.glob(name)
    flip(path, 30)
    before = {p: p.read_bytes() for p in cache.rglob("*") if p.is_file()}
    assert main(["repair", str(cache)]) == 2
    said = capsys.readouterr().err
    assert path.name in said and "copy them from there" in said
    path.unlink()
    assert main(["repair", str(cache)]) == 2
    path.write_bytes(before[path])
    assert {p: p.read_bytes() for p in cache.rglob("*") if p.is_file()} == before
    # As the message says: the same job begun elsewhere writes the same bytes.
    CacheWriter(cache.parent / "again", header(), writer="other", counts_V=np.arange(V) % 7).close()
    assert next((cache.parent / "again").glob(name)).read_bytes() == next(whole.glob(name)).read_bytes()


def test_live_writers_are_left_alone(cache, whole):
    with CacheWriter(cache, header(), writer="live") as writer:
        put(writer, [33], step=3)
        writer.flush()
        stray = cache / "shards" / "live-000001-0000000000000000.safetensors.tmp"
        stray.write_bytes(b"being written")
        flip(shard(cache, 1), -1)
        assert verify(open_store(cache)).notes == []
        done = repair(open_store(cache))
        assert "writer live is alive" in done.lines[0] and done.lost == [39] and stray.exists()
        put(writer, [34], step=3)
    assert verify(open_store(cache)).problems == []
    assert set(format_reader.cache(cache)) == (set(format_reader.cache(whole)) | {33, 34}) - {39}


def test_tools_exclude_each_other(cache):
    from distill.tools.common import alone

    with alone(open_store(cache)):
        for call in (
            lambda: repair(open_store(cache)),
            lambda: compact(open_store(cache), shard_bytes=10**6),
            lambda: main(["compact", str(cache)]) == 2 or None,
        ):
            if call.__code__.co_names[0] == "main":
                assert call()
            else:
                with pytest.raises(CacheError, match="holds the cache for compact, merge or repair"):
                    call()


def test_damage_after_a_compaction_with_many_origins(cache, whole):
    """Records that are salvaged keep their own origins, counted again."""
    compact(open_store(cache), shard_bytes=10**6, purge=True)
    (path,) = (cache / "shards").iterdir()
    flip(path, place_of(path, "records")[0] + 3)  # the first record: sample 0, step 0
    expected = format_reader.cache(whole)
    done = checked(cache, expected, lost=[0])
    assert done.lost == [0] and done.saved == 9
    steps = {
        s.sample_id: (s.step, s.origin.first_step, s.origin.samples, s.origin.tokens)
        for s in CacheReader(cache).samples()
    }
    assert steps[5] == (0, 0, 2, 30) and steps[39] == (1, 1, 2, 30) and steps[30] == (7, 7, 2, 30)


@pytest.mark.parametrize("seed", range(25))
def test_any_damage_at_all(whole, tmp_path, seed):
    """Bits flipped and files cut at random, outside of header and ranks: what is left after a repair is what was there,
    and nothing else; what is gone was said."""
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    rng = random.Random(seed)
    files = sorted([*(folder / "shards").iterdir(), folder / "ledger" / "w.jsonl"])
    for _ in range(rng.randint(1, 4)):
        path = rng.choice(files)
        size = path.stat().st_size
        if size and rng.random() < 0.75:
            flip(path, rng.randrange(size), rng.randrange(8))
        else:
            path.write_bytes(path.read_bytes()[: rng.randrange(size + 1)])
    before = format_reader.cache(whole)
    done = repair(open_store(folder))
    assert verify(open_store(folder), decode=True)[:2] == ([], [])
    after = format_reader.cache(folder)
    old_3 = 0
    for sample, (step, digest, tokens) in after.items():
        if sample == 3 and step == old_3:
            continue  # an older record, which `before` does not show
        assert (step, digest, tokens) == before[sample]
    if set(after) != set(before):
        assert done.lines
    assert CacheReader(folder).covers(np.arange(SAMPLES)).sum() == len(after)
    CacheWriter(folder, header(), writer="w").close()


def test_on_an_object_store():
    url = "memory://repair/cache"
    with CacheWriter(url, header(), writer="w", shard_samples=99) as writer:
        for ids, step in zip(SHARDS, STEPS):
            put(writer, ids, step=step)
            writer.flush()
    store = open_store(url)
    name = f"shards/{store.names('shards')[0]}"
    data = store.read(name)
    store.publish(name, data[:-1] + bytes([data[-1] ^ 1]))
    row = "ledger/w/000000001.json"
    good = store.read(row)
    store.publish(row, good[:40] + b"?" + good[41:])
    torn = "ledger/w/000000004.json"
    store.publish(torn, good[:40])
    assert len(verify(store).problems) == 2 and torn in verify(store).notes[0]
    done = repair(open_store(url))
    assert not store.exists(torn)
    assert done.lost == [9] and verify(open_store(url), decode=True)[:2] == ([], [])
    assert store.read(row) == good and ledgers(store) == ["repair", "w"]
    assert sorted(s.sample_id for s in CacheReader(url).samples()) == [0, 3, 5, 17, 20, 21, 22, 30, 39]
    assert store.exists(name.replace("shards", "quarantine")) and not store.exists(name)


def test_sealed_rows_of_another_cache_are_damage(cache, whole):
    ledger = cache / "ledger" / "w.jsonl"
    rows = ledger.read_bytes().splitlines(keepends=True)
    record = json.loads(rows[4])
    del record["digest"]
    ledger.write_bytes(b"".join(rows[:4]) + seal(record | {"cache": "0" * 16}))
    assert "another cache" in verify(open_store(cache)).problems[0]
    checked(cache, format_reader.cache(whole))
