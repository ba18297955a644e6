"""Random access to a cache by sample id, while writers append."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.cache import record
from distill.cache.codecs import make_codec
from distill.cache.header import CacheHeader
from distill.cache.layout import LEDGER, PAYLOAD, RAGGED, SHARDS
from distill.cache.ledger import LedgerReader, ShardRow
from distill.cache.ranks import load_ranks
from distill.cache.shard import Shard
from distill.cache.targets import SoftTargets
from distill.config.errors import CacheError

Array = NDArray[Any]

_OPEN_SHARDS = 256
"""Mapped at one time; each holds a file descriptor."""


class ReadResult(NamedTuple):
    """Targets of a batch of B samples."""

    targets: SoftTargets
    """Of T = B * S tokens, sample after sample."""
    shard_loss_B: Tensor
    """float32 nats: the teacher's mean label loss on the sample's shard when captured; nan where not covered."""
    step_B: Tensor
    """int64: last teacher step of the sample's shard; -1 where not covered."""


class CacheReader:
    """A view of a cache: what was published at the last `refresh`. Any number of readers may follow any writers."""

    def __init__(self, folder: str | Path):
        """Raises CacheError: no cache, an unknown format or codec, a damaged header, rank table, ledger or index."""
        self.folder = Path(folder)
        self.header = CacheHeader.load(folder)
        self.codec = make_codec(self.header.codec, self.header.vocab_size)
        self._ids_by_rank = load_ranks(self.folder, self.header.ranks, self.header.vocab_size).astype(np.int32)
        self._ledgers: dict[str, LedgerReader] = {}
        self._rows: list[ShardRow] = []
        self._unseen: list[ShardRow] = []
        self._shard_of = np.full(self.header.samples, -1, np.int32)
        self._index_of = np.zeros(self.header.samples, np.int32)
        self._open = lru_cache(_OPEN_SHARDS)(self._open_shard)
        self.refresh()

    def refresh(self) -> int:
        """Takes in what has been published since; returns the number of new shards.

        Raises:
            CacheError: a damaged ledger or shard. The view stays what it was, and the next call fails again.
        """
        for path in sorted((self.folder / LEDGER).glob("*.jsonl")):
            self._unseen += self._ledgers.setdefault(path.name, LedgerReader(path)).poll()
        new_ids = [self._ids_of(row) for row in self._unseen]
        old = len(self._rows)
        self._rows += self._unseen
        self._unseen = []
        # Place of each shard in the order of precedence; -1 (no shard) comes last and gives way to all.
        place = np.empty(len(self._rows) + 1, np.int64)
        place[sorted(range(len(self._rows)), key=lambda i: self._rows[i].order)] = np.arange(len(self._rows))
        place[-1] = -1
        for number, ids in enumerate(new_ids, start=old):
            wins = place[number] > place[self._shard_of[ids]]
            self._shard_of[ids[wins]] = number
            self._index_of[ids[wins]] = np.flatnonzero(wins)
        return len(new_ids)

    @property
    def finished(self) -> bool:
        """There is a writer, and every writer seen so far has said that its stream is complete."""
        return bool(self._ledgers) and all(ledger.finished for ledger in self._ledgers.values())

    def frontier(self, writers: int) -> int | None:
        """The teacher's step before which everything is published or left out for good; None: all of it.

        writers: how many the teacher has; one that has not published yet holds the frontier at 0.
        """
        done = {ledger.path.stem: ledger.finished for ledger in self._ledgers.values()}
        if len(done) >= writers and all(done.values()):
            return None
        last = {name: 0 for name, finished in done.items() if not finished}
        for row in self._rows:
            if row.writer in last:
                # Samples of this very step may still be in the next shard.
                last[row.writer] = max(last[row.writer], row.last_step)
        return min(last.values()) if last and len(done) >= writers else 0

    def covers(self, sample_ids: Array) -> NDArray[np.bool_]:
        """For each sample id, whether there are targets; CacheError for an id that the corpus does not have."""
        sample_ids = np.asarray(sample_ids)
        if len(sample_ids) and not 0 <= sample_ids.min() <= sample_ids.max() < self.header.samples:
            raise CacheError(f"cache {self.folder}: sample ids must lie in 0 to {self.header.samples - 1}")
        covered: NDArray[np.bool_] = self._shard_of[sample_ids] >= 0
        return covered

    def read(self, sample_ids_B: Array, digests_B: Array) -> ReadResult:
        """Targets of a batch.

        digests_B: uint64 digests of the batch's own tokens, compared with those of the tokens that the teacher saw.

        Raises:
            CacheError: a digest that differs, or damaged bytes; names cache or file, and sample.
        """
        covered_B, digests_B = self.covers(sample_ids_B), np.asarray(digests_B, np.uint64)
        samples, width = len(covered_B), self.header.sample_tokens
        loss_B = torch.full((samples,), torch.nan)
        step_B = torch.full((samples,), -1)
        pieces = []
        for place in np.flatnonzero(covered_B).tolist():
            sample = int(sample_ids_B[place])
            shard = self._open(int(self._shard_of[sample]))
            index = int(self._index_of[sample])
            if shard.digests[index] != digests_B[place]:
                raise CacheError(
                    f"cache {self.folder}: sample {sample} has digest {int(shard.digests[index]):016x} in the cache, "
                    f"{int(digests_B[place]):016x} in this batch: the tokens are not those the teacher saw"
                )
            pieces.append(shard.read(index))
            loss_B[place] = torch.nan if shard.row.loss is None else shard.row.loss
            step_B[place] = shard.row.last_step
        targets = self._decode(pieces)
        if len(pieces) < samples:
            targets = _scatter(targets, torch.from_numpy(np.repeat(covered_B, width)))
        return ReadResult(targets, loss_B, step_B)

    def stats(self) -> dict[str, Any]:
        """Plain numbers, and arrays by shard in the order of steps.

        Each sample counts once, in its newest shard; bytes and atoms are those of all published shards per token in
        them, so that a token written twice does not look cheap.
        """
        rows = sorted(self._rows, key=lambda row: row.order)
        tokens = sum(row.tokens for row in rows)
        covered = int((self._shard_of >= 0).sum())
        return {
            "samples": covered,
            "coverage": covered / max(self.header.samples, 1),
            "shards": len(rows),
            "tokens": tokens,
            "bytes": sum(row.bytes for row in rows),
            "bytes_per_token": sum(row.bytes for row in rows) / max(tokens, 1),
            "atoms_per_token": sum(row.atoms for row in rows) / max(tokens, 1),
            "step": np.array([row.last_step for row in rows], np.int64),
            "loss": np.array([np.nan if row.loss is None else row.loss for row in rows], np.float64),
        }

    def _open_shard(self, number: int) -> Shard:
        row = self._rows[number]
        return Shard(self.folder / SHARDS / row.shard, row)

    def _ids_of(self, row: ShardRow) -> Array:
        shard = Shard(self.folder / SHARDS / row.shard, row)
        if len(shard.sample_ids) != row.samples or row.first_sample < 0 or row.last_sample >= self.header.samples:
            raise CacheError(f"{shard.name}: does not fit a corpus of {self.header.samples} samples")
        return shard.sample_ids.copy()

    def _decode(self, pieces: list[dict[str, Array]]) -> SoftTargets:
        if not pieces:
            none = torch.empty(0)
            return SoftTargets(none.long().view(0, 1), none.view(0, 1), none.bool(), none, none)
        columns = {name: np.concatenate([piece[name] for piece in pieces]) for name in PAYLOAD}
        sizes_B3 = np.array([[len(piece[name]) for name in RAGGED] for piece in pieces])
        atoms, label_T, entropy_T, valid_T = record.decode(columns, sizes_B3, self._ids_by_rank)
        return SoftTargets(*self.codec.decode(atoms), valid_T, label_T, entropy_T)


def _scatter(targets: SoftTargets, covered_T: Tensor) -> SoftTargets:
    """Puts the rows of covered samples in their places among zeros."""

    def spread(rows: Tensor) -> Tensor:
        return rows.new_zeros(len(covered_T), *rows.shape[1:]).index_put_((covered_T,), rows)

    return SoftTargets(*map(spread, targets))
