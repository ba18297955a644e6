"""What a cache holds, read from docs/format.md alone (json, xxhash, safetensors): shares nothing with distill.cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors import SafetensorError

from tests import format_reader

Token = tuple[int, int, int | None, list[tuple[int, int]]] | None
Place = tuple[str, int]


@dataclass
class Record:
    """One published record."""

    place: Place
    """Writer and number of its shard."""
    digest: int
    data: bytes


@dataclass
class CheckedCache:
    """All that is published in a folder, and what is wrong with it."""

    shards: dict[Place, str] = field(default_factory=dict)
    """Digests of the files of shards and marks."""
    records: dict[tuple[int, int], list[Record]] = field(default_factory=dict)
    """By (sample, step), of shards that no other replaces."""
    temporary: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def winners(self) -> dict[int, int]:
        """The greatest step of each sample."""
        found: dict[int, int] = {}
        for sample, step in self.records:
            found[sample] = max(step, found.get(sample, -1))
        return found


def scan(folder: Path) -> CheckedCache:
    """Reads every byte of every shard."""
    found = CheckedCache()
    if not (folder / "cache.json").exists():  # killed before there was a cache
        return found
    _, identity = format_reader.header_of(folder)
    shards: dict[Place, Any] = {}
    for path in sorted(path for path in (folder / "shards").rglob("*") if path.is_file()):
        if path.suffix == ".tmp":
            found.temporary.append(path)
            continue
        try:
            shard = format_reader.ShardFile(path, identity)
        except (AssertionError, OSError, ValueError, KeyError, SafetensorError) as error:
            found.problems.append(f"{path.relative_to(folder)}: {type(error).__name__} {error}")
            continue
        place = (shard.header["writer"], shard.header["seq"])
        shards[place] = shard
        found.shards[place] = xxhash.xxh3_64_hexdigest(path.read_bytes())
    gone = {
        (each["writer"], seq)
        for shard in shards.values()
        for each in shard.header["replaces"]
        for seq in range(each["first"], each["last"] + 1)
    }
    there = {*shards, *gone}
    holes = [place for place in shards if place[1] and (place[0], place[1] - 1) not in there]
    found.problems += [f"there is shard {seq} of {writer}, and not the one before it" for writer, seq in holes]
    for place, shard in shards.items():
        for i, sample in enumerate(shard.columns["sample_ids"] if place not in gone else ()):
            record = Record(place, shard.columns["digests"][i], shard.data[i])
            found.records.setdefault((sample, shard.columns["steps"][i]), []).append(record)
    return found


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
