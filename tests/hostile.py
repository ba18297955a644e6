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

from tests.format_reader import ENTRY, FENCE, INDEX, ROW, sealed

WIDTHS = {name: int(kind[2]) for name, kind in INDEX.items()}


@dataclass(repr=False)
class ListingParts:
    """A listing, in pieces; `ref` is what the snapshot says of it."""

    ref: Any
    entries: bytes
    rows: bytes
    footer: Any

    def write(self, folder: Path, identity: str) -> None:
        entries = [self.entries[i : i + 256 * ENTRY.size] for i in range(0, len(self.entries), 256 * ENTRY.size)]
        fences = [FENCE.pack(ENTRY.unpack_from(e.ljust(ENTRY.size, b"\0"))[0], number(e)) for e in entries]
        tops = [b"".join(fences[i : i + 1024]) for i in range(0, len(fences), 1024)]
        rows = [self.rows[i : i + 256 * ROW.size] for i in range(0, len(self.rows), 256 * ROW.size)]
        footer = {
            "fences": [[FENCE.unpack_from(e)[0], digest(e)] for e in tops],
            "origin_blocks": [digest(e) for e in rows],
            "cache": identity,
        }
        kept = {key: value for key, value in footer.items() if key in self.footer and self.footer[key] == "made"}
        end = seal({**self.footer, **kept}) if isinstance(self.footer, dict) else seal(self.footer)
        data = b"".join([*entries, *fences, *rows])
        (folder / self.ref["name"]).write_bytes(data + end)
        self.ref |= {"footer_at": len(data), "bytes": len(data + end), "digest": digest(end)}


@dataclass(repr=False)
class CacheParts:
    """A cache of one stream, in pieces to be changed before `write` puts digests on them."""

    header: Any
    ranks: bytes
    shards: list[tuple[str, Any, bytes]]
    """Of each: the file, the sealed header, and what follows the front."""
    snapshot: Any
    listing: ListingParts
    has_catalog: bool = True
    keep_digests: bool = False
    """Leave the digests of indexes as they are."""

    @classmethod
    def of(cls, folder: Path) -> CacheParts:
        header = sealed((folder / "cache.json").read_bytes())
        (ranks,) = folder.glob("ranks*.safetensors")
        shards = []
        for path in sorted(folder.glob("shards/*/*/*.safetensors")):
            data = path.read_bytes()
            size = 8 + int.from_bytes(data[:8], "little")
            shard = sealed(json.loads(data[8:size])["__metadata__"]["shard"].encode())
            shards.append((str(path.relative_to(folder)), shard, data[size:]))
        (path,) = folder.glob("catalog/*.json")
        snapshot = sealed(path.read_bytes())
        (ref,) = snapshot["listings"]
        data = (folder / ref["name"]).read_bytes()
        footer = sealed(data[ref["footer_at"] :])
        rows_at = ref["footer_at"] - footer["origins"] * ROW.size
        entries, rows = data[: footer["entries"] * ENTRY.size], data[rows_at : ref["footer_at"]]
        for record in (header, snapshot, footer, *(shard for _, shard, _ in shards)):
            del record["digest"]
        footer |= dict.fromkeys(("fences", "origin_blocks", "cache"), "made")
        return cls(header, ranks.read_bytes(), shards, snapshot, ListingParts(ref, entries, rows, footer))

    def copy(self) -> CacheParts:
        return copy.deepcopy(self)

    def write(self, folder: Path, checks: bool = True) -> None:
        """The cache; checks: of records are made anew too, where the columns allow it."""
        shutil.rmtree(folder, ignore_errors=True)
        for name in ("shards", "catalog", "locks"):
            (folder / name).mkdir(parents=True)
        (folder / f"ranks-{digest(self.ranks)}.safetensors").write_bytes(self.ranks)
        data = seal(self.header, indent=1)
        (folder / "cache.json").write_bytes(data)
        identity = digest(data)
        for name, record, body in self.shards:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(self._shard(record, body, identity, checks))
        if not self.has_catalog:
            return
        snapshot = copy.deepcopy(self.snapshot)
        with contextlib.suppress(TypeError, KeyError, AttributeError):
            snapshot["cache"] = identity
            self.listing.write(folder, identity)
            if snapshot["listings"] == self.snapshot["listings"] and len(snapshot["listings"]) == 1:
                snapshot["listings"] = [snapshot["listings"][0] | self.listing.ref]
        (folder / "catalog" / "000000000.json").write_bytes(seal(snapshot, indent=1))

    def _shard(self, record: Any, body: bytes, identity: str, checks: bool) -> bytes:
        """A file whose digests verify, laid out as a writer does where the numbers in its header allow that."""
        outer: dict[str, Any] = {}
        with contextlib.suppress(TypeError, KeyError, AttributeError, OverflowError, MemoryError):
            record = dict(record) | {"cache": identity}
            n, at = record["samples"], 0
            if checks:
                body = _checked(body, n)
            if not self.keep_digests:
                record["index"] = digest(body[: n * sum(WIDTHS.values())])
            outer = {"__metadata__": {"shard": seal(record).decode()}}
            for name, width in WIDTHS.items():
                kind = {"i": "I", "u": "U"}[INDEX[name][1]] + str(8 * width)
                outer[name] = {"dtype": kind, "shape": [n], "data_offsets": [at, at + n * width]}
                at += n * width
            size = record["records"]
            outer["records"] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        text = json.dumps(outer, separators=(",", ":")).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
        return struct.pack("<Q", len(text)) + text + body


def number(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data)


def digest(data: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(data)


def seal(record: Any, indent: int | None = None) -> bytes:
    body = json.dumps(record, indent=indent).encode()
    body = body[:-1].rstrip() + (b",\n " if indent else b", ")
    return body + f'"digest": "{digest(body)}"}}\n'.encode()


def spans(n: int) -> dict[str, tuple[int, int]]:
    """Where the columns of n samples, and after them the records, begin and end."""
    found, at = {}, 0
    for name, width in WIDTHS.items():
        found[name] = (at, at + n * width)
        at += n * width
    return found


def _checked(body: bytes, n: int) -> bytes:
    """`body` with the column `checks` that its records ask for."""
    try:
        columns = {name: body[start:end] for name, (start, end) in spans(n).items()}
        records = body[n * sum(WIDTHS.values()) :]
        ends = [0, *struct.unpack(f"<{n}I", columns["ends"])]
        checks = b"".join(
            struct.pack(
                "<Q",
                number(
                    records[ends[i] : ends[i + 1]]
                    + columns["sample_ids"][8 * i : 8 * i + 8]
                    + columns["digests"][8 * i : 8 * i + 8]
                ),
            )
            for i in range(n)
        )
        start = spans(n)["checks"][0]
        return body[:start] + checks + body[start + len(checks) :]
    except (KeyError, TypeError, ValueError, OverflowError, MemoryError, struct.error):
        return body
