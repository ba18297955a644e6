"""Listings, snapshots and views, against a dictionary."""

import dataclasses
import json
import os
import random
import shutil
import struct
from collections import Counter

import numpy as np
import pytest
import xxhash

from distill.cache import CacheReader, cataloging, listing, listing_writer, view
from distill.cache.header import CacheHeader
from distill.cache.loss_curve import LossSums
from distill.cache.open_store import open_store
from distill.cache.origins import Origin
from distill.cache.publish import create, publish_mark, publish_shard
from distill.cache.shard import Columns
from distill.cache.shard_header import Replaced
from distill.cache.view import open_view, refreshed
from distill.config.errors import CacheError
from distill.config.schema import CodecConfig
from tests import format_reader

N = 700
"""Samples of forged caches."""


@pytest.fixture(params=["small", "as they are"])
def blocks(request, monkeypatch):
    """Blocks so small that a listing of hundreds has many of each kind, and lists are made in pieces."""
    if request.param == "small":
        for name, size in dict(ENTRIES=8, FENCES=4, ORIGINS=3).items():
            monkeypatch.setattr(listing, name, size)
            monkeypatch.setattr(listing_writer, name, size)
        monkeypatch.setattr(listing, "KEPT", 5)
        monkeypatch.setattr(listing_writer, "_TOGETHER", 64)
        monkeypatch.setattr(cataloging, "PIECE", 150)
        monkeypatch.setattr(cataloging, "_LARGEST", 300)
        monkeypatch.setattr(view, "_TABLES", 3)


class Forge:
    """A cache of shards whose records are any bytes, and in a dictionary what counts."""

    def __init__(self, folder, seed=0):
        self.draw = np.random.default_rng(seed)
        self.folder, self.store = folder, open_store(folder)
        whole = CacheHeader(V, "t", "c", 4, N, CodecConfig(), 0) if (V := 64) else None
        self.header = create(self.store, whole, None)
        self.streams, self.all = Counter(), {}
        """Shards of each writer; and (writer, seq) -> [(sample, step, record)] of all."""

    def shard(self, writer, count=None, ids=None, steps=None, replaces=(), source="capture"):
        draw, seq = self.draw, self.streams[writer]
        ids = draw.integers(0, N, count or draw.integers(1, 60)) if ids is None else np.asarray(ids)
        steps = draw.integers(0, 5, len(ids)) if steps is None else np.asarray(steps)
        data = [draw.bytes(int(draw.integers(1, 9))) for _ in ids]
        of = draw.integers(0, 2, len(ids))
        origins, losses = [], LossSums()
        for k in np.unique(of).tolist():
            mine = steps[of == k]
            origins.append(Origin(
                f"teacher {writer} {k}", "capture", int(mine.min()), int(mine.max()), len(mine), len(mine), 7, 1.5,
                False, 0.0,
            ))  # fmt: skip
            losses.add_tokens(origins[-1].teacher, "capture", mine, np.full(len(mine), 1.5))
        columns = Columns(
            ids.astype(np.int64),
            ids.astype(np.uint64) + 7,
            steps,
            np.ones(len(ids), np.int64),
            np.unique(of, return_inverse=True)[1],
        )
        publish_shard(
            self.store, self.header.identity, writer, seq, source, columns, np.frombuffer(b"".join(data), np.uint8),
            np.cumsum([len(d) for d in data]), origins, losses, replaces,
        )  # fmt: skip
        self.all[writer, seq] = list(zip(ids.tolist(), steps.tolist(), data))
        self.streams[writer] += 1
        return seq

    def mark(self, writer, kind):
        publish_mark(self.store, self.header.identity, writer, self.streams[writer], kind, "capture", 0)
        self.streams[writer] += 1

    def truth(self, gone=()):
        """Sample -> (step, check, is a tool's, writer, seq, place) of the record that counts, and its bytes."""
        found = {}
        for (writer, seq), records in self.all.items():
            if (writer, seq) not in gone:
                for place, (sample, step, data) in enumerate(records):
                    check = xxhash.xxh3_64_intdigest(data + struct.pack("<qQ", sample, sample + 7))
                    key = (step, check, writer in format_reader.TOOLS, writer, seq, place)
                    if sample not in found or found[sample][0] < key:
                        found[sample] = (key, data)
        return found

    def view(self):
        return open_view(self.store, self.header)


def check(forge, one, truth):
    """A view against the dictionary: where each record lies, its bytes, and the view as a whole."""
    ids = np.arange(N)
    forge.draw.shuffle(ids)
    for part in np.array_split(ids, 3):
        records = one.find(part)
        assert records.there.tolist() == [i in truth for i in part.tolist()]
        data = one.read(records)
        for n in np.flatnonzero(records.there).tolist():
            (step, _, _, writer, seq, place), want = truth[int(part[n])]
            names, row = one.names(int(records.tables[n])), records.rows[n]
            assert (records.steps[n], names.writers[row["writer"]], row["seq"]) == (step, writer, seq)
            start = sum(len(d) for _, _, d in forge.all[writer, seq][:place])
            assert (records.entries[n]["start"], data[n]) == (start, want)
            assert names.origin(row).teacher.startswith(f"teacher {writer} ")
    assert one.covered == len(truth) and sorted(i for part in one.chunks(50) for i in part.tolist()) == sorted(truth)


def tokens(one):
    return sum(origin.tokens for origin in one.summary)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_found_is_what_a_dictionary_finds(tmp_path, blocks, seed):
    """Streams of several writers with superseding steps and ties; listings by writer, of all, merged, rebuilt."""
    forge, pins = Forge(tmp_path, seed), []
    following = forge.view()
    for turn in range(24):
        for _ in range(forge.draw.integers(0, 4)):
            forge.shard(str(forge.draw.choice(["a", "b", "B", "w-1"])))
        if turn % 7 == 3:
            forge.mark("a", ["begin", "end", "gap"][turn % 3])
        match int(forge.draw.integers(0, 6)):
            case 0:
                cataloging.update(forge.store, forge.header)
            case 1:
                cataloging.update(forge.store, forge.header, is_merging=True)
            case 2 if forge.streams["b"]:
                cataloging.update(forge.store, forge.header, ["b"])
            case 3:
                cataloging.update(forge.store, forge.header, is_rebuilding=True)
        truth = forge.truth()
        fresh, following = forge.view(), refreshed(following)
        assert fresh.losses == following.losses and tokens(fresh) == tokens(following) == sum(
            map(len, forge.all.values())
        )
        if turn % 4 == 0:
            check(forge, fresh, truth)
            check(forge, following, truth)
            pins.append((fresh.pin, truth))
            pins.append((following.pin, truth))
    for pin, old in pins:
        check(forge, open_view(forge.store, forge.header, json.loads(json.dumps(pin))), old)
    cataloging.update(forge.store, forge.header, is_merging=True)
    check(forge, forge.view(), truth)
    assert format_reader.newest(tmp_path) == {i: key for i, (key, _) in truth.items()}
    if listing.ENTRIES == 256:
        assert format_reader.catalog(tmp_path) == format_reader.newest(tmp_path)
    shutil.rmtree(tmp_path / "catalog")
    check(forge, forge.view(), truth)
    for pin, old in pins:  # the snapshot is gone, the shards serve
        check(forge, open_view(forge.store, forge.header, pin), old)
    made = cataloging.update(forge.store, forge.header)
    assert made.number == 0
    check(forge, forge.view(), truth)


def test_the_listing_of_the_page_is_the_listing(tmp_path):
    """The second reader, which checks every digest, over whole blocks and more than one of each kind."""
    forge = Forge(tmp_path)
    for n in range(280):
        forge.shard("ab"[n % 2], ids=forge.draw.permutation(N)[:5])
        if n % 90 == 50:
            cataloging.update(forge.store, forge.header, is_merging=n > 100)
    assert format_reader.catalog(tmp_path) == format_reader.newest(tmp_path)
    cataloging.update(forge.store, forge.header, is_merging=True)
    assert format_reader.catalog(tmp_path) == {i: key for i, (key, _) in forge.truth().items()}


def test_what_another_shard_replaces_does_not_count(tmp_path):
    """From the next snapshot on for readers that have one, at once for those that have none; a pinned view has it."""
    forge = Forge(tmp_path)
    for _ in range(4):
        forge.shard("a")
    forge.shard("b", steps=[9] * 30, ids=range(30))
    cataloging.update(forge.store, forge.header)
    before, old = forge.view(), forge.truth()
    kept = [(i, key[0]) for i, (key, _) in sorted(old.items()) if key[3] == "a" and key[4] < 3]
    forge.shard(
        "compact",
        ids=[i for i, _ in kept],
        steps=[s for _, s in kept],
        replaces=[Replaced("a", 0, 2)],
        source="compact",
    )
    assert refreshed(before) is before
    check(forge, forge.view(), old)
    cataloging.update(forge.store, forge.header)
    new = forge.truth(gone={("a", n) for n in range(3)})
    check(forge, forge.view(), new)
    check(forge, refreshed(before), new)
    check(forge, open_view(forge.store, forge.header, before.pin), old)
    shutil.rmtree(tmp_path / "catalog")
    check(forge, forge.view(), new)
    for n in range(3):
        os.remove(tmp_path / f"shards/a/000000/{n:09d}.safetensors")
    check(forge, forge.view(), new)
    with pytest.raises(
        CacheError, match=r"a/000000/000000000\.safetensors: the shard is missing; if `compact --purge`"
    ):
        open_view(forge.store, forge.header, before.pin)
    cataloging.update(forge.store, forge.header)
    check(forge, forge.view(), new)
    assert format_reader.catalog(tmp_path) == {i: key for i, (key, _) in new.items()}


def test_a_reader_goes_on_where_snapshots_between_are_gone(tmp_path, monkeypatch):
    forge = Forge(tmp_path)
    forge.shard("a")
    cataloging.update(forge.store, forge.header)
    old = forge.view()
    for _ in range(3):
        forge.shard("a")
        cataloging.update(forge.store, forge.header)
    for number in range(3):
        os.remove(tmp_path / f"catalog/{number:09d}.json")
    check(forge, refreshed(old), forge.truth())
    monkeypatch.setattr(view, "_LONG", 2)
    assert refreshed(refreshed(old)).snapshot.number == 3
    check(forge, refreshed(refreshed(old)), forge.truth())


def test_a_snapshots_number_is_taken_once(tmp_path, monkeypatch):
    """Two processes make the same number at one moment: the second takes in what the first has made."""
    forge = Forge(tmp_path)
    forge.shard("a")
    first = cataloging.update(forge.store, forge.header)
    forge.shard("a")
    forge.shard("b")
    publish, others = cataloging.publish_snapshot, []

    def late(store, snapshot):
        if not others:
            others.append(None)
            others.append(cataloging.update(forge.store, forge.header, ["b"]))
        return publish(store, snapshot)

    monkeypatch.setattr(cataloging, "publish_snapshot", late)
    made = cataloging.update(forge.store, forge.header, ["a"])
    assert (others[1].number, made.number) == (1, 2)
    assert {name: state.count for name, state in others[1].streams.items()} == {"a": 1, "b": 1}
    assert {name: state.count for name, state in made.streams.items()} == {"a": 2, "b": 1}
    check(forge, forge.view(), forge.truth())
    named = {ref.name for each in (first, others[1], made) for ref in each.listings}
    assert {f"catalog/{path.name}" for path in (tmp_path / "catalog").glob("*.listing")} == named


# ---------------------------------------------------------------- damage


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(data)


def footer_at(path):
    """Where the footer of the newest snapshot's last listing starts."""
    snapshots = sorted(path.parent.glob("*.json"))
    return json.loads(snapshots[-1].read_text())["listings"][-1]["footer_at"]


PLACES = {
    "an entry": lambda path, draw: draw.randrange(44 * 500),
    "a fence": lambda path, draw: 44 * entries_of(path) + draw.randrange(16),
    "an origin row": lambda path, draw: footer_at(path) - 1 - draw.randrange(84 * 3),
    "the footer": lambda path, draw: draw.randrange(footer_at(path), path.stat().st_size),
}


def entries_of(path):
    return json.loads(sorted(path.parent.glob("*.json"))[-1].read_text())["listings"][-1]["entries"]


@pytest.mark.parametrize("kind", [*PLACES, "cut", "gone", "longer", "empty"])
@pytest.mark.parametrize("has_older", [True, False])
def test_a_damaged_listing_is_named_and_answers_stay_right(tmp_path, kind, has_older, caplog):
    forge, draw = Forge(tmp_path), random.Random(0)
    for n in range(60):
        forge.shard("ab"[n % 2])
        if has_older and n == 30:
            cataloging.update(forge.store, forge.header)
            old = set((tmp_path / "catalog").glob("*.listing"))
    cataloging.update(forge.store, forge.header, is_merging=True)
    (path,) = set((tmp_path / "catalog").glob("*.listing")) - (old if has_older else set())
    whole, truth = path.read_bytes(), forge.truth()
    forge.shard("b")
    later = forge.truth()
    for _ in range(6):
        path.write_bytes(whole)
        opened = forge.view()
        if kind in PLACES:
            flip(path, PLACES[kind](path, draw))
        elif kind == "gone":
            path.unlink()
        else:
            path.write_bytes({"cut": whole[: draw.randrange(len(whole))], "longer": whole + b"x", "empty": b""}[kind])
        caplog.clear()
        # Opened before the damage, opened after it, pinned: right answers.
        for one in (dataclasses.replace(opened), None, opened.pin):
            reader = CacheReader(tmp_path, one if isinstance(one, dict) else None)
            if isinstance(one, view.View):
                reader._view = one
            found = reader.records(np.arange(N))
            assert {i: s.data for i, s in enumerate(found) if s is not None} == {
                i: data for i, (_, data) in later.items()
            }
            assert reader.steps(np.arange(N)).tolist() == [later[i][0][0] if i in later else -1 for i in range(N)]
        if kind not in ("longer",):
            assert any(str(path) in r.getMessage() for r in caplog.records), caplog.text
    assert truth != later
    path.write_bytes(whole)
    flip(path, 3)
    assert cataloging.update(forge.store, forge.header, is_rebuilding=True).number == 1 + has_older
    check(forge, forge.view(), later)


def test_a_reader_with_a_damaged_listing_waits_for_a_new_one(tmp_path):
    """It does not read all shards again at each refresh."""
    forge = Forge(tmp_path)
    for _ in range(9):
        forge.shard("a")
    cataloging.update(forge.store, forge.header)
    (path,) = (tmp_path / "catalog").glob("*.listing")
    flip(path, 3)
    reader = CacheReader(tmp_path)
    reader.steps(np.arange(N))
    assert reader.view["snapshot"] == -1
    one = reader._view
    assert reader.refresh() == 0 and reader._view is one
    forge.shard("a")
    assert reader.refresh() == 1 and reader.view["snapshot"] == -1
    cataloging.update(forge.store, forge.header, is_rebuilding=True)
    assert reader.refresh() == 0 and reader.view["snapshot"] == 1
    check(forge, reader._view, forge.truth())


@pytest.mark.parametrize("kind", ["flip", "cut", "empty", "another number", "another cache", "json"])
def test_a_damaged_snapshot_is_named_and_the_one_before_serves(tmp_path, kind, caplog):
    forge, draw = Forge(tmp_path), random.Random(1)
    for n in range(12):
        forge.shard("ab"[n % 2])
        if n in (4, 8):
            cataloging.update(forge.store, forge.header)
    truth, path = forge.truth(), tmp_path / "catalog/000000001.json"
    whole = path.read_bytes()
    pin = forge.view().pin
    for _ in range(5):
        path.write_bytes(whole)
        if kind == "flip":
            flip(path, draw.randrange(len(whole)))
        elif kind == "another number":
            shutil.copy(tmp_path / "catalog/000000000.json", path)
        elif kind == "another cache":
            other = Forge(tmp_path / f"other{_}", seed=2)
            other.header = dataclasses.replace(other.header, seed=3)
            path.write_bytes(cataloging.Snapshot("0" * 16, 1).dump())
        else:
            path.write_bytes({"cut": whole[: draw.randrange(len(whole))], "empty": b"", "json": b"[]\n"}[kind])
        caplog.clear()
        one = forge.view()
        assert one.snapshot.number == 0 and str(path) in caplog.text
        check(forge, one, truth)
        check(forge, open_view(forge.store, forge.header, pin), truth)
    assert cataloging.update(forge.store, forge.header).number == 2
    check(forge, forge.view(), truth)
    assert refreshed(one).snapshot.number == 2


def test_stray_files_in_the_catalog_do_not_matter(tmp_path):
    forge = Forge(tmp_path)
    forge.shard("a")
    for name in ("1.json", "000000007.json.tmp", "x.listing", ".000000009.json", "000000008.JSON"):
        (tmp_path / "catalog" / name).write_text("{}")
    (tmp_path / "catalog" / ".ipynb_checkpoints").mkdir()
    assert cataloging.update(forge.store, forge.header).number == 0
    check(forge, forge.view(), forge.truth())
