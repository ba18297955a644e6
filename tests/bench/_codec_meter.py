"""A codec at one setting of its parameter on rows whose distributions are known: its error and its bytes on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.cache import Atoms, CacheHeader, CacheReader, CacheWriter, make_codec
from distill.cache.entries import ENTRY
from distill.cache.shard_header import WIDTH
from distill.config.registry import CODECS
from distill.config.schema import CodecConfig
from tests.bench._yardstick import EXPONENTS, VOCAB, rows
from tests.shards import headers


class CodecSetting(NamedTuple):
    """A codec's name and the value of its one parameter."""

    codec: str
    value: float

    def config(self) -> CodecConfig:
        (parameter,) = CODECS[self.codec].parameters
        return CodecConfig(self.codec, **{parameter: self.value})


class ShardBytes(NamedTuple):
    """Bytes per token of the files that a writer made."""

    all: float
    """The shard and its samples' entries in a listing; with few tokens the shard's header is a large part. Marks and
    snapshots, which a stream has few of, are not counted."""
    records: float
    index: float
    """The samples' entries in the index of the shard and in a listing."""


class DecodedRows(NamedTuple):
    """Stored distributions of a block of tokens."""

    ids_TK: Tensor
    probs_TK: Tensor
    """float64; 0 where padded."""


class CodecMeter:
    """Takes rows block by block. `sample_tokens` numbers them for the codec's randomness."""

    def __init__(self, setting: CodecSetting, seed: int, sample_tokens: int, vocab: int = VOCAB):
        self.setting, self.seed, self.sample_tokens, self.vocab = setting, seed, sample_tokens, vocab
        self.codec = make_codec(setting.config(), vocab)
        self.tokens = 0
        self._atoms: list[Atoms] = []
        self._errors, self._labels, self._entropies = [], [], []

    def add(self, p_TV: Tensor, logits_TV: Tensor, labels_T: Tensor) -> DecodedRows:
        place_T = torch.arange(self.tokens, self.tokens + len(p_TV))
        where = {"sample_ids_T": place_T // self.sample_tokens, "positions_T": place_T % self.sample_tokens}
        selection = self.codec.select(logits_TV, torch.zeros(len(p_TV)), seed=self.seed, **where)
        ids_TK, probs_TK = self.codec.decode(selection.atoms)
        probs_TK = probs_TK.double()
        # |q - p|^2 over the vocabulary; of topk the loss takes the k alone, since its residual mass has no id.
        true_TK = p_TV.gather(1, ids_TK)
        self._errors.append(p_TV.square().sum(1) + (probs_TK * (probs_TK - 2 * true_TK)).sum(1))
        self._atoms.append(selection.atoms)
        self._labels.append(logits_TV.gather(1, labels_T[:, None])[:, 0])
        self._entropies.append(selection.entropy_T)
        self.tokens += len(p_TV)
        return DecodedRows(ids_TK, probs_TK)

    @property
    def error(self) -> float:
        """Mean squared distance of stored and true distributions."""
        return float(torch.cat(self._errors).mean())

    @property
    def atoms_per_token(self) -> float:
        return sum(float(atoms.counts_T.sum()) for atoms in self._atoms) / self.tokens

    @property
    def entropy(self) -> float:
        return float(torch.cat(self._entropies).mean())

    def bytes(self, sample_tokens: int | None = None) -> ShardBytes:
        """Of all tokens, written as samples of `sample_tokens`; they are read back and compared."""
        width = sample_tokens or self.sample_tokens
        samples, atoms = self.tokens // width, Atoms.cat(self._atoms)
        ids, digests = np.arange(samples), np.arange(samples, dtype=np.uint64)
        header = CacheHeader(self.vocab, "yardstick", "yardstick", width, samples, self.setting.config(), 0)
        with tempfile.TemporaryDirectory() as folder:
            with CacheWriter(folder, header, writer="teacher-00000") as writer:
                writer.put(
                    ids, digests, atoms, torch.cat(self._labels), torch.cat(self._entropies),
                    torch.ones(self.tokens, dtype=torch.bool), step=0, tokens_seen=0, teacher="yardstick",
                )  # fmt: skip
            reader = CacheReader(folder)
            self._check(atoms, reader.read(ids, digests).targets)
            shards = headers(Path(folder))
            return ShardBytes(
                all=sum(shard.bytes + ENTRY.itemsize * shard.samples for shard in shards) / self.tokens,
                records=sum(shard.records for shard in shards) / self.tokens,
                index=(WIDTH + ENTRY.itemsize) / width,
            )

    def _check(self, atoms: Atoms, stored: tuple[Tensor, ...]) -> None:
        """Compares every 97th token."""
        decoded = self.codec.decode(atoms)
        for t in range(0, self.tokens, 97):
            of_atoms, of_cache = (
                {i: p for i, p in zip(ids_TK[t].tolist(), probs_TK[t].tolist()) if p}
                for ids_TK, probs_TK in (decoded, stored[:2])
            )
            assert of_atoms == of_cache


def on_rows(
    settings: Iterable[CodecSetting],
    seed: int,
    count: int,
    sample_tokens: int,
    exponents: tuple[float, float] = EXPONENTS,
    vocab: int = VOCAB,
) -> dict[CodecSetting, CodecMeter]:
    """Every setting on the same `count` rows of the yardstick."""
    meters = {setting: CodecMeter(setting, seed, sample_tokens, vocab) for setting in settings}
    g = torch.Generator().manual_seed(seed + 1)
    for p_TV in rows(count, seed, exponents=exponents, vocab=vocab):
        labels_T, logits_TV = torch.multinomial(p_TV.float(), 1, generator=g)[:, 0], p_TV.log().float()
        for meter in meters.values():
            meter.add(p_TV, logits_TV, labels_T)
        print(f"\r  V {vocab}: {next(iter(meters.values())).tokens} of {count} tokens", end="", flush=True)
    print("\r", end="")
    return meters


def sweep(values: dict[str, tuple[float, ...]]) -> list[CodecSetting]:
    """All settings, from the parameter's values by codec."""
    return [CodecSetting(codec, value) for codec, some in values.items() for value in some]
