"""A small cache to be damaged, the ways to damage it, and what must hold after a repair."""

import json

import numpy as np

from distill.cache import CacheReader, CacheWriter
from distill.cache.format import shard_name
from distill.cache.loss_curve import LossSums
from distill.cache.open_store import open_store
from distill.tools.repair import Repair, repair
from distill.tools.verify import verify
from tests import format_reader
from tests.workers.cache_writers import V, digests, header, put

SHARDS = [[0, 3, 5, 9], [17, 39], [20, 21, 22], [3, 30]]
"""Behind a begin mark, numbers 1 to 4. Sample 3 is made again at step 7."""
STEPS = [0, 1, 2, 7]


def make(folder):
    """A whole cache of one stream, between marks."""
    with CacheWriter(folder, header(), writer="w", counts_V=np.arange(V) % 7, shard_samples=99) as writer:
        for ids, step in zip(SHARDS, STEPS):
            put(writer, ids, step=step)
            writer.flush()
        writer.finish()
    return folder


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


def header_of(folder):
    return CacheReader(folder).header


def losses_of(data):
    front = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return LossSums.of(json.loads(front["__metadata__"]["shard"])["losses"])


def swap(one, two):
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b)
    two.write_bytes(a)
