"""Small caches for tests of tools, and what is in them."""

import numpy as np

from distill.cache import CacheHeader, CacheReader, CacheWriter
from distill.cache.open_store import open_store
from distill.cache.shard import Shard
from distill.cache.view import open_view
from tests import format_reader
from tests.workers.cache_writers import V, header, put


def origins(folder):
    """What each sample's record says of its teacher, by way of a reader; and the mean loss of its shard."""
    reader = CacheReader(folder)
    return {
        sample.sample_id: (sample.step, sample.origin.teacher, sample.origin.source, sample.origin.loss)
        for sample in reader.samples()
    }


def write(folder, writer, parts, **options):
    """parts: (sample ids, step, teacher); one shard each."""
    with CacheWriter(folder, header(), writer=writer, counts_V=np.arange(V) % 7, shard_samples=99, **options) as w:
        for ids, step, teacher in parts:
            put(w, ids, step=step, teacher=teacher)
            w.flush()
        w.finish()


PARTS = [([5, 1, 9], 0, "x"), ([0, 2], 1, "x"), ([7], 2, "x"), ([1, 30, 31], 3, "y"), ([8, 2], 4, "y")]


def two_writers(folder):
    """Five shards by two writers; samples 1 and 2 twice."""
    write(folder, "b", PARTS[:3])
    write(folder, "a", PARTS[3:])
    return folder


def total_tokens(folder, ids):
    """Tokens with a target, counted from the records."""
    found = format_reader.cache(folder)
    return sum(token is not None for sample in ids for token in found[sample][2])


def counting(folder):
    """Headers of the shards with samples that count, in the order of the catalog."""
    store = open_store(folder)
    head = CacheHeader.load(store)
    names, rows = open_view(store, head).origins()
    return [Shard(store, head, *names.shard(row)).header for row in rows[rows["number"] == 0]]


def files(folder):
    """Names of the files of shards, by writer and number."""
    return sorted((path.parts[-3], int(path.stem)) for path in (folder / "shards").glob("*/*/*.safetensors"))


def check_origin_counts(folder):
    """Every origin's samples and tokens are those of the records that point at it."""
    reader = CacheReader(folder)
    counted: dict = {}
    for sample in reader.samples():
        counted.setdefault((sample.shard, sample.origin), []).append(sample.sample_id)
    for (_, origin), ids in counted.items():
        assert origin.samples == len(ids)
        assert origin.tokens == total_tokens(folder, ids)
    assert sum(shard.tokens for shard in counting(folder)) == sum(o.tokens for _, o in counted)
