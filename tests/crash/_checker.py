"""What a cache holds, read from docs/cache.md alone (json, xxhash, safetensors): shares nothing with distill.cache."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load

from tests import format_reader

Token = tuple[int, int, int | None, list[tuple[int, int]]] | None


@dataclass
class Record:
    """One published record."""

    ledger: str
    seq: int
    digest: int
    data: bytes


@dataclass
class CheckedCache:
    """All that is published in a folder, and what is wrong with it."""

    rows: dict[str, list[bytes]] = field(default_factory=dict)
    """Complete lines of each ledger."""
    records: dict[tuple[int, int], list[Record]] = field(default_factory=dict)
    """By (sample, step)."""
    shards: set[str] = field(default_factory=set)
    """Names that rows point at."""
    problems: list[str] = field(default_factory=list)

    def winners(self) -> dict[int, int]:
        """The greatest step of each sample."""
        found: dict[int, int] = {}
        for sample, step in self.records:
            found[sample] = max(step, found.get(sample, -1))
        return found


def scan(folder: Path) -> CheckedCache:
    """Reads every byte of every published shard."""
    found = CheckedCache()
    header = folder / "cache.json"
    if not header.exists():  # killed before there was a cache
        return found
    identity = xxhash.xxh3_64_hexdigest(header.read_bytes())
    for ledger in sorted((folder / "ledger").glob("*.jsonl")):
        lines = ledger.read_bytes().split(b"\n")[:-1]  # what follows the last newline is not published
        found.rows[ledger.stem] = [line + b"\n" for line in lines]
        for seq, line in enumerate(found.rows[ledger.stem]):
            where = f"{ledger.name} row {seq}"
            try:
                row = format_reader.sealed(line)
                assert (row["writer"], row["seq"], row["cache"]) == (ledger.stem, seq, identity), "another's row"
                if row["kind"] == "shard":
                    found.shards.add(row["shard"])
                    _shard(folder / "shards" / row["shard"], row, found)
            except (AssertionError, OSError, ValueError, KeyError, SafetensorError) as error:
                found.problems.append(f"{where}: {type(error).__name__} {error}")
    return found


def _shard(path: Path, row: dict[str, Any], found: CheckedCache) -> None:
    data = path.read_bytes()
    assert len(data) == row["bytes"], "size"
    assert xxhash.xxh3_64_hexdigest(data) == row["file_digest"], "file digest"
    assert xxhash.xxh3_64_hexdigest(data[: row["index_bytes"]]) == row["index_digest"], "index digest"
    columns = load(data)
    start, ids = 0, columns["sample_ids"].tolist()
    assert (len(ids), min(ids), max(ids)) == (row["samples"], row["first_sample"], row["last_sample"]), "samples"
    for i, sample in enumerate(ids):
        end, token_digest = int(columns["ends"][i]), int(columns["digests"][i])
        record = columns["records"][start:end].tobytes()
        assert xxhash.xxh3_64_intdigest(record + struct.pack("<qQ", sample, token_digest)) == columns["checks"][i]
        start = end
        key = (sample, int(columns["steps"][i]))
        found.records.setdefault(key, []).append(Record(path.stem, row["seq"], token_digest, record))
    assert start == len(columns["records"]), "bytes that belong to no record"


def tokens(data: bytes, header: dict[str, Any], id_of_rank: list[int]) -> list[Token]:
    """A record's tokens by the slow reader; equal bytes are decoded once."""
    key = (data, header["sample_tokens"], str(header["codec"]), header["ranks"])
    if key not in _DECODED:
        _DECODED[key] = format_reader.record(data, header["sample_tokens"], header["codec"], id_of_rank)
    return _DECODED[key]


_DECODED: dict[tuple[bytes, int, str, str], list[Token]] = {}


def first_difference(
    found: list[Token],
    atoms: list[dict[int, int]],
    label: np.ndarray,
    entropy: np.ndarray,
    valid: np.ndarray,
    vocab: int,
) -> str | None:
    """Where a record differs first from its teacher's targets; None: nowhere."""
    for t, token in enumerate(found):
        if (token is not None) != bool(valid[t]):
            return f"token {t}: a target where none is, or none where one is"
        if token is None:
            continue
        e, label_code, _, pairs = token
        if dict(pairs) != atoms[t] or len(pairs) != len(atoms[t]):
            return f"token {t}: atoms {dict(pairs)}, the teacher's {atoms[t]}"
        for name, got, want, top in (
            ("entropy", e, entropy[t], float(np.log(vocab))),
            ("label", label_code, -label[t], 32.0),
        ):
            if abs(np.sqrt(min(max(float(want), 0.0), top) / top) * 255 - got) > 0.5001:
                return f"token {t}: {name} is code {got}, of {want} nats"
    return None
