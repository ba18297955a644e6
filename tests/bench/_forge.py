"""Shards made by the million for `catalog`: valid in every byte, without an encoder and without fsync.

All samples have the same record of one token. Ids are in a shuffled order, as a teacher meets them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash

from distill.cache import CacheHeader, CacheWriter
from distill.cache.format import shard_name
from distill.cache.loss_curve import LossSums
from distill.cache.open_store import open_store
from distill.cache.origins import Origin
from distill.cache.seal import digest
from distill.cache.shard import Shard
from distill.cache.shard_header import COLUMNS, ShardHeader, front
from distill.config.schema import CodecConfig

_TYPES = {"I64": "<i8", "U64": "<u8", "U32": "<u4", "U16": "<u2"}
VOCAB = 512


def cache_header(samples: int) -> CacheHeader:
    return CacheHeader(VOCAB, "forged", "forged", 1, samples, CodecConfig(), 0)


def token_digests(sample_ids: np.ndarray) -> np.ndarray:
    """What takes the place of the digest of a forged sample's tokens."""
    return (sample_ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)


def one_record(folder: Path, header: CacheHeader) -> tuple[bytes, int]:
    """A record of one token, and its atoms, from a cache that is made for it."""
    import torch

    with CacheWriter(folder, header, writer="one") as writer:
        logits = torch.full((1, VOCAB), -20.0)
        logits[0, 7] = 0.0
        writer.put_logits(
            np.array([0]), token_digests(np.array([0])), logits, torch.tensor([7]), torch.ones(1, dtype=torch.bool),
            step=0, tokens_seen=0, teacher="forged",
        )  # fmt: skip
    shard = Shard(open_store(folder), CacheHeader.load(folder), "one", 1)
    return shard.span(0, 1)[0], int(shard.columns.atoms[0])


def shard_files(
    header: CacheHeader, record: bytes, atoms: int, shards: int, writer: str, seed: int = 0
) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each shard of a stream that covers all samples once."""
    order = np.random.default_rng(seed).permutation(header.samples)
    size = header.samples // shards
    for seq in range(shards):
        ids = order[seq * size : (seq + 1) * size].astype(np.int64)
        origin = Origin("forged", "capture", seq, seq, size, size, seq * size, 0.25, False, 0.0)
        losses = LossSums()
        losses.add_tokens("forged", "capture", np.full(size, seq), np.full(size, 0.25))
        index = _index(ids, record, atoms, seq)
        shard = ShardHeader(
            cache=header.identity, writer=writer, seq=seq, kind="targets", source="capture", step=seq, samples=size,
            first_sample=int(ids.min()), last_sample=int(ids.max()), tokens=size, atoms=atoms * size,
            records=len(record) * size, index=digest(index), origins=(origin,), losses=losses, replaces=(),
        )  # fmt: skip
        yield shard_name(writer, seq), b"".join([front(shard), index, record * size])


def _index(ids: np.ndarray, record: bytes, atoms: int, step: int) -> bytes:
    size, digests = len(ids), token_digests(ids)
    rows = np.zeros(size, [("record", f"V{len(record)}"), ("id", "<i8"), ("digest", "<u8")])
    rows["record"], rows["id"], rows["digest"] = np.void(record), ids, digests
    data, width, hashed = rows.tobytes(), rows.dtype.itemsize, xxhash.xxh3_64_intdigest
    columns = {
        "sample_ids": ids,
        "digests": digests,
        "checks": np.array([hashed(data[i : i + width]) for i in range(0, len(data), width)], np.uint64),
        "ends": np.arange(1, size + 1) * len(record),
        "steps": np.full(size, step),
        "atoms": np.full(size, atoms),
        "origins": np.zeros(size),
    }
    return b"".join(np.asarray(columns[name]).astype(_TYPES[dtype]).tobytes() for name, (dtype, _) in COLUMNS.items())


def write(folder: Path, files: Iterator[tuple[str, bytes]], count: int, what: str) -> None:
    """Writes files, with progress."""
    began = time.monotonic()
    for number, (name, data) in enumerate(files):
        path = folder / name
        if number % 1000 == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            print(f"\r{what}: {number} of {count} shards, {time.monotonic() - began:.0f} s", end="", flush=True)
        path.write_bytes(data)
    print()
