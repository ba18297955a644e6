"""The golden caches, from integers alone: `python -m tests.golden.cache_maker FOLDER` writes them.

Their bytes change only with the version of the format, `distill.cache.format.FORMAT`.
"""

import random
import secrets
import sys
import time
from itertools import count
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from distill.cache import Atoms, CacheHeader, CacheWriter
from distill.config.schema import CodecConfig

V, S, SAMPLES = 300, 8, 12
CODECS = {
    name: CodecConfig(name, draws=20, tau=0.05, k=3) for name in ("systematic", "threshold", "multinomial", "topk")
}


def rows(name: str, sample: int) -> list[list[tuple[int, int]]]:
    """(id, code) pairs of each token of a sample."""
    dice = random.Random(f"{name} {sample}")
    found = []
    for _ in range(S):
        ids = dice.sample(range(V), 3 if name == "topk" else dice.randint(1, 9))
        if name in ("systematic", "multinomial"):
            cuts = sorted(dice.sample(range(1, 20), len(ids) - 1))
            codes = [b - a for a, b in zip([0, *cuts], [*cuts, 20])]
        else:
            codes = [dice.choice([0, dice.randrange(256)]) for _ in ids]
        found.append(list(zip(ids, codes)))
    return found


def put(writer: CacheWriter, name: str, samples: list[int], step: int) -> None:
    tokens = [row for sample in samples for row in rows(name, sample)]
    flat = torch.tensor([pair for row in tokens for pair in row], dtype=torch.int32)
    counts = torch.tensor([len(row) for row in tokens], dtype=torch.int32)
    place_T = np.arange(len(tokens))
    rest = torch.from_numpy((place_T * 37 % 256).astype(np.uint8))[: len(tokens) if name == "topk" else 0]
    writer.put(
        np.array(samples),
        np.array(samples, np.uint64) * np.uint64(0x9E3779B97F4A7C15),
        Atoms(counts, flat[:, 0].contiguous(), flat[:, 1].contiguous(), rest),
        -place_T / 8,
        place_T % 40 / 8,
        place_T % S != S - 1,
        step=step,
        tokens_seen=step * 100,
        teacher="golden",
    )


def make(folder: Path) -> None:
    """Names of listings and times of snapshots are those of no machine and no day."""
    numbers = count()
    with (
        mock.patch.object(secrets, "token_hex", lambda size: f"{next(numbers):0{2 * size}x}"),
        mock.patch.object(time, "time", lambda: 1_800_000_000.0),
    ):
        _make(folder)


def _make(folder: Path) -> None:
    for name, codec in CODECS.items():
        header = CacheHeader(V, "tokenizer", "corpus", S, SAMPLES, codec, seed=5, stream={"seed": 0})
        counts_V = np.arange(V) * 7 % 101
        with CacheWriter(folder / name, header, writer="w", counts_V=counts_V, shard_samples=2) as writer:
            put(writer, name, [3, 1], step=0)
            put(writer, name, [9], step=4)
            writer.finish()
        for lock in (folder / name).rglob("*.lock"):
            lock.unlink()


if __name__ == "__main__":
    make(Path(sys.argv[1]))
