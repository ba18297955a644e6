"""The sealed header of a shard, which says what the shard is, and the bytes at the front of its file. No torch.

A stream is the numbered shards of one writer. Beside shards with targets it holds marks, shards without samples:
`begin` where a writer starts or goes on after an end, `end` where its stream is complete, `gap` where a shard was lost.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from distill.cache.fields import checked
from distill.cache.format import FORMAT, RECORDS
from distill.cache.loss_curve import LossSums
from distill.cache.origins import SOURCES, Origin
from distill.cache.seal import seal, unseal

COLUMNS = {
    "sample_ids": ("I64", 8), "digests": ("U64", 8), "checks": ("U64", 8), "ends": ("U32", 4), "steps": ("U32", 4),
    "atoms": ("U32", 4), "origins": ("U16", 2),
}  # fmt: skip
"""Type, in the names of safetensors, and bytes of a sample, of each column of the index."""
WIDTH = sum(width for _, width in COLUMNS.values())
"""Bytes of a sample in the index."""
MAX_SAMPLES = 2**22
"""Of one shard."""
MAX_ORIGINS = 2**16
"""Of one shard."""
MAX_FRONT = 2**26
"""Bytes in front of the index."""
KINDS = ("targets", "begin", "end", "gap")


@dataclass(frozen=True)
class Replaced:
    """A range of shards whose records that count, and sums of losses, all lie in another shard now."""

    writer: str
    first: int
    last: int
    """Inclusive."""


@dataclass(frozen=True)
class ShardHeader:
    """What a shard says of itself."""

    cache: str
    """Digest of the cache's header."""
    writer: str
    seq: int
    """Number in the writer's stream, from 0."""
    kind: str
    """targets, or of a mark: begin, end or gap."""
    source: str
    """What wrote it: capture, backfill, import, compact, merge or repair."""
    step: int
    """Greatest step of the records; of a mark, the step from which the stream goes on; -1: none."""
    samples: int
    first_sample: int
    """Smallest id; -1 without samples."""
    last_sample: int
    tokens: int
    """Tokens that have a target."""
    atoms: int
    records: int
    """Bytes of the records."""
    index: str
    """Digest of the index, which has a digest of each record."""
    origins: tuple[Origin, ...]
    losses: LossSums
    replaces: tuple[Replaced, ...]
    """Shards that do not count any more since this one is there."""

    @property
    def bytes(self) -> int:
        """Of the whole file."""
        return len(front(self)) + WIDTH * self.samples + self.records

    @property
    def is_mark(self) -> bool:
        return self.kind != "targets"

    @classmethod
    def of(cls, record: dict[str, Any]) -> ShardHeader:
        """From JSON; raises TypeError, KeyError or ValueError when it is not a header."""
        if record.pop("format") != FORMAT:
            raise ValueError("it has another format")
        parts = {
            "origins": tuple(checked(Origin, each) for each in record["origins"]),
            "losses": LossSums.of(record["losses"]),
            "replaces": tuple(checked(Replaced, each) for each in record["replaces"]),
        }
        header = checked(cls, record | parts)
        counts = (header.seq, header.samples, header.tokens, header.atoms, header.records, header.step + 1)
        if min(counts) < 0 or header.samples > MAX_SAMPLES or header.kind not in KINDS:
            raise ValueError("a number or a kind that cannot be")
        if len(header.origins) > MAX_ORIGINS or any(origin.source not in SOURCES for origin in header.origins):
            raise ValueError("origins that cannot be")
        if header.is_mark and header.samples:
            raise ValueError(f"a mark with {header.samples} samples")
        return header


def front(header: ShardHeader) -> bytes:
    """The bytes in front of the index: the header of a safetensors file, whose metadata is the sealed header."""
    record = {"format": FORMAT} | {f.name: getattr(header, f.name) for f in dataclasses.fields(header)}
    record["origins"] = [dataclasses.asdict(origin) for origin in header.origins]
    record["losses"] = header.losses.json()
    record["replaces"] = [dataclasses.asdict(each) for each in header.replaces]
    file: dict[str, Any] = {"__metadata__": {"shard": seal(record).decode()}}
    start, n = 0, header.samples
    for name, (dtype, width) in COLUMNS.items():
        file[name] = {"dtype": dtype, "shape": [n], "data_offsets": [start, start + width * n]}
        start += width * n
    file[RECORDS] = {"dtype": "U8", "shape": [header.records], "data_offsets": [start, start + header.records]}
    text = json.dumps(file, separators=(",", ":"), allow_nan=False).encode()
    size = -(-len(text) // 8) * 8
    return size.to_bytes(8, "little") + text.ljust(size)


def front_size(data: bytes) -> int:
    """Bytes in front of the index of a file that begins with `data`; ValueError when that cannot be."""
    size = 8 + int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > MAX_FRONT:
        raise ValueError(f"a header of {size - 8} bytes")
    return size


def parse_front(data: bytes) -> ShardHeader:
    """Inverse of `front`; ValueError when any byte is another one."""
    try:
        sealed = json.loads(data[8:])["__metadata__"]["shard"]
        header = ShardHeader.of(unseal(sealed.encode()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header does not verify ({error!s:.200})") from error
    if front(header) != data:
        raise ValueError("its header is not laid out as a writer does")
    return header
