"""The cache of `_forge` in format 2, made with the code of its last commit: `python FILE DIR SAMPLES SHARDS`.

Run with that commit's work tree as PYTHONPATH.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from distill.cache.ledger import Origin

from distill.cache import CacheHeader, CacheReader, CacheWriter
from distill.cache.format import SHARDS, shard_name
from distill.cache.open_store import open_store
from distill.cache.publish import create
from distill.cache.seal import digest, seal
from distill.cache.shard import Columns, build, row_of_file
from distill.config.schema import CodecConfig

VOCAB = 512


def digests_of(sample_ids: np.ndarray) -> np.ndarray:
    return (sample_ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)


def main(folder: str, samples: int, shards: int) -> None:
    import dataclasses
    import json

    header = CacheHeader(VOCAB, "forged", "forged", 1, samples, CodecConfig(), 0)
    logits = torch.full((1, VOCAB), -20.0)
    logits[0, 7] = 0.0
    with tempfile.TemporaryDirectory() as other:
        with CacheWriter(other, header, writer="one") as writer:
            ids, valid = np.array([0]), torch.ones(1, dtype=torch.bool)
            kind = {"step": 0, "tokens_seen": 0, "teacher": "forged"}
            writer.put_logits(ids, digests_of(ids), logits, torch.tensor([7]), valid, **kind)
        [one] = CacheReader(other).samples()
    header = create(open_store(folder), header, None)
    order, size = np.random.default_rng(0).permutation(samples), samples // shards
    records, ends = np.frombuffer(one.data * size, np.uint8), np.arange(1, size + 1) * len(one.data)
    with (Path(folder) / "ledger" / "teacher.jsonl").open("wb") as ledger:
        for seq in range(shards):
            ids = order[seq * size : (seq + 1) * size].astype(np.int64)
            zeros = np.zeros(size, np.int64)
            columns = Columns(ids, digests_of(ids), zeros + seq, zeros + one.atoms, zeros)
            origin = Origin("forged", "capture", seq, seq, size, size, seq * size, 0.25, False, 0.0)
            metadata = {"cache": header.identity, "origins": json.dumps([dataclasses.asdict(origin)])}
            data = build(columns, records, ends, metadata)
            name = shard_name("teacher", seq, digest(data))
            (Path(folder) / SHARDS / name).write_bytes(data)
            ledger.write(seal({"kind": "shard"} | dataclasses.asdict(row_of_file(data, name))))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
