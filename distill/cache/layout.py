"""The format on disk, version 1. Every number is little-endian; every digest is xxh3-64.

A cache is a folder:

    cache.json                      what it is about (`CacheHeader`); sealed JSON
    ranks.safetensors               `ids_by_rank` uint32 [V]: ids by falling corpus frequency; digest in cache.json
    shards/<writer>-<number>.safetensors
    ledger/<writer>.jsonl           one sealed JSON row per published shard, in order of publication
    ledger/<writer>.lock, .lock     empty but for a process id; held by flock while a writer lives, or creates

Sealed JSON ends with a key "digest" over all bytes before it. Files ending in .tmp are not part of the cache. Shards
never change. A shard counts only once its ledger row is complete (ends with a newline); a torn last row is ignored.
The last row of a writer that has said that its stream is complete has "kind": "finish". A sample may be in several
shards: the row with the greatest (last_step, writer, seq) wins.

A shard is a safetensors file that holds n samples of S tokens. Its first `index_bytes` bytes, with a digest in the
ledger row, are the safetensors header with the metadata, and the index columns:

    sample_ids  int64  [n]       index of the sample in the corpus
    digests     uint64 [n]       digest of the sample's tokens
    checks      uint64 [n]       digest of the sample's bytes in all columns below, in the order given
    ends        uint32 [n, 3]    where the sample's bytes end in `unary`, `low` and `codes`; they start where the
                                 previous sample's end

After them the payload, all uint8, in which every sample is whole bytes and depends on nothing but itself:

    orders      [n, 6]           the coder's order of each of four number columns (below), base of the first two
    label       [n, S]           -log p(label) = 32 (c / 254)^2, or 255: the token has no target, and no atoms
    entropy     [n, S]           log V (c / 255)^2
    rest        [n, S] or [0]    the codec's code of the residual mass
    unary, low  [bytes]          number columns, coded
    codes       [bytes]          one byte for each head atom, in the order of its id's column

The four number columns, over the sample's tokens that have a target: how many head atoms (less the base); how many
tail atoms (less the base); gaps of head ids; gaps of tail ids. An id is stored as its rank; ranks of a token ascend,
and a gap is rank - previous rank - 1, the previous of the first being -1.

Exp-Golomb code of order k of a number v: w = v + 2^k has b + 1 bits; b - k zeros and a one go to `unary`, the b low
bits of w to `low`, both most significant bit first. (A Rice code, whose low part has k bits always, needs 4 bits more
for a tail id at V = 202,048, where gaps spread over five decades.) One after the other the four columns fill both
streams. Order 255 says that all numbers of the column are 0 and nothing is stored. Padding bits are zero.
"""

from __future__ import annotations

import re
from pathlib import Path

from distill.config.errors import CacheError

FORMAT = 1
MAX_VOCAB = 2**24
HEADER = "cache.json"
RANKS = "ranks.safetensors"
SHARDS = "shards"
LEDGER = "ledger"
LOCK = ".lock"

INDEX = ("sample_ids", "digests", "checks", "ends")
PAYLOAD = ("orders", "label", "entropy", "rest", "unary", "low", "codes")
RAGGED = ("unary", "low", "codes")
NO_TARGET = 255
LABEL_LEVELS, LABEL_TOP = 254, 32.0
ENTROPY_LEVELS = 255


def shard_name(writer: str, number: int) -> str:
    return f"{writer}-{number:06d}.safetensors"


def ledger_path(folder: Path, writer: str) -> Path:
    """The writer's ledger; CacheError when the name cannot be a file's."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", writer):
        raise CacheError(f"writer is {writer!r}; allowed are letters, digits and _ . - (not first)")
    return folder / LEDGER / f"{writer}.jsonl"
