"""How large a cache becomes, before the first record: the real codec and coder, on made-up teachers' rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distill.cache import record
from distill.cache.codecs import Codec, make_codec
from distill.cache.header import CacheHeader
from distill.cache.shard import WIDTHS
from distill.cache.store import Store
from distill.cache.targets import Atoms
from distill.cache.view import published
from distill.config.errors import CacheError
from distill.config.schema import CodecConfig

Array = NDArray[Any]

ROW_BYTES = 650
"""Of a shard's row in a ledger, with one origin."""
HEADER_BYTES = 850
"""Of a shard's safetensors header, with one origin."""
OPEN_SHARDS = 64
"""Whose indexes a reader keeps in memory."""
INDEX_BYTES = 48
"""Of a sample in an open index: five columns of 8 bytes, and where its record ends."""
TABLE_BYTES = 16
"""Of a sample in a reader's table of newest records."""
SHARD_MEMORY = 1300
"""Of a shard's row in a reader, as measured."""
SPREAD = 1.25
"""Made-up rows against caches of trained teachers: within this factor either way (LOG.md)."""
_STRETCHES = 3000
"""Of ranks in a made-up row, at most."""
_PROBED = 256
"""Rows whose mean entropy is set."""
_CHUNK = 512
"""Tokens whose rows are made at one time."""
EXPONENTS = (1.1, 4.0)
"""Of made-up rows, before they are scaled to the wanted entropy: 1.84 nats at V = 202,048."""
NOISE = 1.5
_TOKENS = 2048
"""That are made up, in one sample or several; a longer sample learns its own statistics a little better."""


@dataclass(frozen=True)
class BytesPerToken:
    """Of records, with a range and the figure's source."""

    low: float
    likely: float
    high: float
    source: str


@dataclass(frozen=True)
class Estimate:
    """Sizes in bytes."""

    per_token: BytesPerToken
    samples: int
    shards: int
    low: float
    """Size of all files."""
    likely: float
    high: float
    ledgers: float
    ranks: float
    reader_memory: float
    """Of each reader process, beyond the libraries: ranks, rows and open indexes."""
    reader_table: float
    """Of each reader process in a nameless temporary file: which shard holds the newest record of a sample."""


def estimate(
    tokens: int, corpus_samples: int, header: CacheHeader, per_token: BytesPerToken, shard_samples: int
) -> Estimate:
    """The cache that holds `tokens` tokens of a corpus; every one has a target."""
    samples = -(-tokens // header.sample_tokens)
    shards = -(-samples // shard_samples)
    ranks = 4.0 * header.vocab_size
    ledgers = float(ROW_BYTES * shards)
    fixed = samples * sum(WIDTHS.values()) + shards * HEADER_BYTES + ledgers + ranks
    return Estimate(
        per_token=per_token,
        samples=samples,
        shards=shards,
        low=tokens * per_token.low + fixed,
        likely=tokens * per_token.likely + fixed,
        high=tokens * per_token.high + fixed,
        ledgers=ledgers,
        ranks=ranks,
        reader_memory=ranks + SHARD_MEMORY * shards + OPEN_SHARDS * min(shard_samples, samples) * INDEX_BYTES,
        reader_table=float(TABLE_BYTES * corpus_samples),
    )


def from_cache(store: Store) -> tuple[CacheHeader, BytesPerToken]:
    """As an existing cache has it: its records' mean, and the leanest and the fullest tenth of its shards.

    Raises:
        CacheError: no cache, one without records, or damage.
    """
    header = CacheHeader.read(store)
    rows = [row for row in published(store, header).rows if row.tokens]
    if not rows:
        raise CacheError(f"{store.root}: holds no records yet; nothing can be estimated from it")
    each = np.array([(row.bytes - row.index_bytes) / row.tokens for row in rows])
    mean = sum(row.bytes - row.index_bytes for row in rows) / sum(row.tokens for row in rows)
    low, high = np.quantile(each, [0.1, 0.9]).tolist()
    return header, BytesPerToken(min(low, mean), mean, max(high, mean), f"{len(rows)} shards of {store.root}")


def from_rows(codec: CodecConfig, vocab_size: int, sample_tokens: int, entropy: float) -> BytesPerToken:
    """For a teacher whose mean entropy is `entropy` nats, by encoding made-up samples.

    The rows are those of the codecs' bench, scaled: entropies vary from almost none to several times the mean, and
    probable ids are common ones more often than not.

    Raises:
        CacheError: a codec that cannot be.
    """
    width = min(sample_tokens, _TOKENS)
    entropy = min(entropy, 0.9 * math.log(vocab_size))
    likely = _encoded(make_codec(codec, vocab_size), vocab_size, width, -(-_TOKENS // width), entropy)
    source = f"made-up tokens of {entropy:g} nats"
    return BytesPerToken(likely / SPREAD, likely, likely * SPREAD, source)


def _encoded(codec: Codec, vocab_size: int, width: int, samples: int, entropy: float) -> float:
    """Bytes per token of rows of power laws: the probability at rank r is as (r + q)^-s, q in [0, 1], s over a range
    that gives the mean entropy; the corpus's rank of that id is its place among log r + 1.5 x a standard normal."""
    tokens = samples * width
    # Ranks in stretches, singly at first; one id stands for each stretch, another one for every token.
    edge_I = np.unique(np.rint(np.geomspace(1, vocab_size + 1, _STRETCHES)))
    width_I = np.diff(edge_I)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    spread_T1, q_T1 = rng.random((2, tokens, 1))
    s_T1 = _exponents(edge_I, spread_T1, q_T1, entropy)
    grid, place = _places(edge_I, width_I)
    parts, entropies, labels = [], [], []
    for first in range(0, tokens, _CHUNK):
        part = slice(first, first + _CHUNK)
        logits_TI = torch.from_numpy(_logits(edge_I, s_T1[part], q_T1[part])).float()
        lse_T = logits_TI.logsumexp(-1)
        positions_T = torch.arange(first, first + len(lse_T))
        atoms, entropy_T = codec.select(
            logits_TI, lse_T, seed=0, sample_ids_T=torch.zeros_like(positions_T), positions_T=positions_T
        )
        stretch = atoms.ids_N.numpy()
        rank = edge_I[stretch] + (rng.random(len(stretch)) * width_I[stretch]).astype(np.int64)
        ids = np.interp(np.log(rank) + NOISE * rng.standard_normal(len(rank)), grid, place).astype(np.int64)
        row = np.repeat(np.arange(len(lse_T)), atoms.counts_T.numpy())
        parts.append(atoms._replace(ids_N=torch.from_numpy(_distinct(row, ids, vocab_size)).int()))
        entropies.append(entropy_T)
        drawn_T1 = torch.multinomial((logits_TI - lse_T[:, None]).exp(), 1, generator=generator)
        labels.append(logits_TI.gather(1, drawn_T1)[:, 0] - lse_T)
    encoded = record.encode(
        Atoms.cat(parts),
        torch.cat(labels).numpy(),
        torch.cat(entropies).numpy(),
        np.ones(tokens, np.bool_),
        width,
        np.arange(vocab_size),
        codec,
    )
    return float(encoded.ends[-1]) / tokens


def _logits(edge_I: Array, s_T1: Array, q_T1: Array) -> Array:
    """[T, I]: log of the weight of each stretch of ranks."""
    middle_I = np.sqrt(edge_I[:-1] * (edge_I[1:] - 1))
    logits_TI: Array = np.log(np.diff(edge_I)) - s_T1 * np.log(middle_I + q_T1)
    return logits_TI


def _exponents(edge_I: Array, spread_T1: Array, q_T1: Array, entropy: float) -> Array:
    """s [T, 1], so that the mean entropy of the first rows is the wanted one."""
    low, high = 1e-3, 100.0
    width_I = np.diff(edge_I)
    for _ in range(40):
        scale = math.sqrt(low * high)
        s_T1 = scale * (EXPONENTS[0] + spread_T1 * (EXPONENTS[1] - EXPONENTS[0]))
        logits_TI = _logits(edge_I, s_T1[:_PROBED], q_T1[:_PROBED])
        logp_TI = logits_TI - np.logaddexp.reduce(logits_TI, 1, keepdims=True)
        found = -(np.exp(logp_TI) * (logp_TI - np.log(width_I))).sum(1).mean()
        low, high = (scale, high) if found > entropy else (low, scale)
    return s_T1


def _places(edge_I: Array, width_I: Array) -> tuple[Array, Array]:
    """The place among all of V that a value of log r + noise has on average, on a grid of values."""
    grid = np.linspace(-5 * NOISE, math.log(edge_I[-1]) + 5 * NOISE, 400)
    z = (grid[:, None] - np.log((edge_I[:-1] + edge_I[1:] - 1) / 2)) / NOISE
    below = 0.5 * (1 + torch.erf(torch.from_numpy(z / math.sqrt(2))).numpy())
    return grid, np.minimum((below * width_I).sum(1), edge_I[-1] - 2)


def _distinct(row: Array, ids: Array, vocab_size: int) -> Array:
    """The ids, where two of a row are the same moved on to the next free ones."""
    order = np.lexsort((ids, row))
    keys = row[order] * (2 * vocab_size) + ids[order]
    # keys that must rise by at least 1 from each to the next: running maximum of key - index.
    keys = np.maximum.accumulate(keys - np.arange(len(keys))) + np.arange(len(keys))
    moved = np.empty_like(ids)
    moved[order] = (keys - row[order] * (2 * vocab_size)) % vocab_size
    return moved
