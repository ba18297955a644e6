"""Caches whose every digest verifies and whose content is chosen freely: made without distill.cache."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from tests.format_reader import sealed


@dataclass(repr=False)
class CacheParts:
    """A cache of one ledger, in pieces to be changed before `write` puts digests on them."""

    header: Any
    ranks: bytes
    rows: list[Any]
    shards: list[tuple[Any, bytes]]
    """Of each row that has one: the safetensors header, and what follows it."""
    keep_digests: bool = False
    """Leave the digests and sizes in rows as they are."""

    @classmethod
    def of(cls, folder: Path) -> CacheParts:
        header = sealed((folder / "cache.json").read_bytes())
        (ranks,) = folder.glob("ranks*.safetensors")
        (ledger,) = (folder / "ledger").glob("*.jsonl")
        rows = [sealed(line) for line in ledger.read_bytes().splitlines(keepends=True)]
        shards = []
        for row in rows:
            if row["kind"] == "shard":
                data = (folder / "shards" / row["shard"]).read_bytes()
                (front,) = struct.unpack("<Q", data[:8])
                shards.append((json.loads(data[8 : 8 + front]), data[8 + front :]))
        for record in (header, *rows):
            del record["digest"]
        return cls(header, ranks.read_bytes(), rows, shards)

    def copy(self) -> CacheParts:
        return copy.deepcopy(self)

    def write(self, folder: Path, checks: bool = True) -> None:
        """The cache; checks: of records are made anew too, where the columns allow it."""
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "shards").mkdir(parents=True)
        (folder / "ledger").mkdir()
        (folder / f"ranks-{digest(self.ranks)}.safetensors").write_bytes(self.ranks)
        data = seal(self.header, indent=1)
        (folder / "cache.json").write_bytes(data)
        identity, shards, lines = digest(data), iter(self.shards), []
        for row in self.rows:
            row = dict(row) if isinstance(row, dict) else row
            if isinstance(row, dict) and "cache" in row:
                row["cache"] = identity
            if isinstance(row, dict) and row.get("kind") == "shard":
                try:
                    front, body = next(shards)
                except StopIteration:
                    front, body = {}, b""
                text = json.dumps(front).encode()
                if checks:
                    body = _checked(front, body)
                file = struct.pack("<Q", len(text)) + text + body
                if not self.keep_digests:
                    sizes = {"bytes": len(file), "file_digest": digest(file)}
                    sizes["index_bytes"] = len(file) - _payload(front, body)
                    sizes["index_digest"] = digest(file[: sizes["index_bytes"]])
                    row |= {key: value for key, value in sizes.items() if key in row}
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a name that no file has
                    (folder / "shards" / row["shard"]).write_bytes(file)
            lines.append(seal(row))
        (folder / "ledger" / "w.jsonl").write_bytes(b"".join(lines))


def digest(data: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(data)


def seal(record: Any, indent: int | None = None) -> bytes:
    body = json.dumps(record, indent=indent).encode()
    body = body[:-1].rstrip() + (b",\n " if indent else b", ")
    return body + f'"digest": "{digest(body)}"}}\n'.encode()


def _payload(front: Any, body: bytes) -> int:
    """Bytes of what comes after the index."""
    try:
        return max(len(body) - int(front["records"]["data_offsets"][0]), 0)
    except (KeyError, TypeError, IndexError, ValueError, OverflowError):
        return 0


def _checked(front: Any, body: bytes) -> bytes:
    """`body` with the column `checks` that its records ask for."""
    try:
        spans = {name: front[name]["data_offsets"] for name in ("checks", "ends", "sample_ids", "digests", "records")}
        columns = {name: body[start:end] for name, (start, end) in spans.items()}
        count = len(columns["ends"]) // 4
        ends = [0, *struct.unpack(f"<{count}I", columns["ends"])]
        checks = b"".join(
            struct.pack(
                "<Q",
                xxhash.xxh3_64_intdigest(
                    columns["records"][ends[i] : ends[i + 1]]
                    + columns["sample_ids"][8 * i : 8 * i + 8]
                    + columns["digests"][8 * i : 8 * i + 8]
                ),
            )
            for i in range(count)
        )
        start = spans["checks"][0]
        return body[:start] + checks + body[start + len(checks) :]
    except (KeyError, TypeError, ValueError, struct.error):
        return body
