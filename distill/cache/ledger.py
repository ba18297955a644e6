"""The append-only record of published shards, one file per writer. Starts without torch.

A row is one line of sealed JSON. A line without its newline is a row that is being written, or was being written when
its writer died: readers do not see it, and the writer removes it when it opens the ledger again.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from distill.cache.files import reported, write_all
from distill.cache.seal import seal, unseal
from distill.config.errors import CacheError
from distill.config.files import sync

log = logging.getLogger(__name__)

_WHOLE_ROW = re.compile(rb'"digest": "[0-9a-f]{16}"\}.', re.DOTALL)


@dataclass(frozen=True)
class ShardRow:
    """One published shard."""

    writer: str
    seq: int
    """Number of the row in its ledger, from 0."""
    shard: str
    """File name in `shards/`."""
    samples: int
    first_sample: int
    """Smallest id; which ids there are is in the shard."""
    last_sample: int
    tokens: int
    """Tokens that have a target."""
    atoms: int
    bytes: int
    """Size of the file."""
    file_digest: str
    index_bytes: int
    """Header and index columns, at the start of the file."""
    index_digest: str
    teacher: str
    """Identity of the teacher."""
    first_step: int
    last_step: int
    tokens_seen: int
    """By the teacher, before the last of these samples."""
    loss: float | None
    """Teacher's mean label loss over `tokens`, nats; null without tokens."""

    @property
    def order(self) -> tuple[int, str, int]:
        """Of two rows that hold a sample the greater wins."""
        return self.last_step, self.writer, self.seq


class LedgerReader:
    """Follows one ledger."""

    def __init__(self, path: Path):
        self.path = path
        self.offset = 0
        """Bytes of complete rows read."""
        self.seq = 0
        """Rows read."""
        self.finished = False
        """The last row read says that the writer's stream is complete."""

    def poll(self) -> list[ShardRow]:
        """New complete rows.

        Raises:
            CacheError: a row that does not verify, is out of sequence, or was cut off after it had been read.
        """
        with reported(self.path), self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < self.offset:
                raise CacheError(f"{self.path} is damaged: {size} bytes, {self.offset} have been read before")
            file.seek(self.offset)
            data = file.read()
        rows = []
        *lines, torn = data.split(b"\n")
        for line in lines:
            try:
                record = unseal(line + b"\n")
                kind = record.pop("kind")
                if (record["writer"], record["seq"]) != (self.path.stem, self.seq):
                    raise ValueError(f"it is row {record['seq']} of {record['writer']}, expected {self.seq}")
                if kind == "shard":
                    rows.append(ShardRow(**record))
                elif kind != "finish":
                    raise ValueError(f"its kind is {kind!r}")
            except (ValueError, TypeError, KeyError) as error:
                raise CacheError(f"{self.path} line {self.seq + 1} is damaged: {error}") from error
            self.finished = kind == "finish"
            self.seq += 1
            self.offset += len(line) + 1
        if _WHOLE_ROW.search(torn):
            raise CacheError(f"{self.path} line {self.seq + 1} is damaged: no newline where the row ends")
        return rows


class LedgerWriter:
    """Appends to one ledger. The caller holds the writer's lock."""

    def __init__(self, path: Path):
        """Opens or creates the ledger; reads what is there and removes a torn last row.

        Raises:
            CacheError: a damaged complete row, or a file that cannot be opened.
        """
        self.path = path
        with reported(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            with reported(path):
                sync(path.parent)
            self._repair()
        except BaseException:
            os.close(self._fd)
            raise

    def _repair(self) -> None:
        reader = LedgerReader(self.path)
        self.rows = reader.poll()
        self.seq, self.finished = reader.seq, reader.finished
        with reported(self.path):
            torn = os.fstat(self._fd).st_size - reader.offset
            if torn:
                log.warning("%s: removed a torn last row of %d bytes", self.path, torn)
                os.ftruncate(self._fd, reader.offset)
                os.fsync(self._fd)

    def append(self, row: ShardRow) -> None:
        """Publishes a shard: returns when the row is on disk."""
        self._append({"kind": "shard"} | dataclasses.asdict(row))
        self.finished = False

    def finish(self, writer: str) -> None:
        """Says that this writer's stream is complete, unless the last row says so already."""
        if not self.finished:
            self._append({"kind": "finish", "writer": writer, "seq": self.seq})
            self.finished = True

    def _append(self, record: dict[str, object]) -> None:
        """A part that an error leaves behind is a torn row: the writer must be opened anew, which removes it."""
        with reported(self.path):
            write_all(self._fd, seal(record))
            os.fsync(self._fd)
        self.seq += 1

    def close(self) -> None:
        os.close(self._fd)
