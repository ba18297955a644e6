"""How large a cache becomes, before the first record: the real codec and coder, on made-up teachers' rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from distill.cache import record
from distill.cache.codecs import Codec, make_codec
from distill.cache.header import CacheHeader
from distill.cache.shard import WIDTHS
from distill.cache.store import Store
from distill.cache.targets import Atoms
from distill.cache.view import published
from distill.config.errors import CacheError
from distill.config.schema import CodecConfig

ROW_BYTES = 700
"""Of a shard's row in a ledger, with one origin."""
HEADER_BYTES = 800
"""Of a shard's safetensors header, with one origin."""
OPEN_SHARDS = 64
"""Whose indexes a reader keeps in memory."""
INDEX_BYTES = 48
"""Of a sample in an open index: five columns of 8 bytes, and where its record ends."""
TABLE_BYTES = 16
"""Of a sample in a reader's table of newest records."""
SHARD_MEMORY = 1500
"""Of a shard's row in a reader."""
SPREAD = 1.25
"""Made-up rows against caches of trained teachers: within this factor either way (LOG.md)."""
_IDS = 3000
"""With a probability in a made-up row: all of a small vocabulary, else ever fewer of the rarer ones."""
_CHUNK = 512
"""Tokens whose rows are made at one time."""
NOISE = 2.5
"""Standard deviation of made-up logits around those of common and rare ids."""
_TOKENS = 2048
"""Of a made-up sample at most; a longer one learns its own statistics a little better."""


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


def estimate(tokens: int, corpus_samples: int, header: CacheHeader, per_token: BytesPerToken, shard_samples: int) -> Estimate:
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
    """For a teacher whose mean entropy is `entropy` nats, by encoding one made-up sample.

    Entropies of the tokens vary as a teacher's do, from almost none to several times the mean; probable ids are common
    ones more often than not.

    Raises:
        CacheError: a codec that cannot be.
    """
    tokens = min(sample_tokens, _TOKENS)
    likely = _encoded(make_codec(codec, vocab_size), vocab_size, tokens, min(entropy, 0.9 * math.log(vocab_size)))
    source = f"{tokens} made-up tokens of {entropy:g} nats"
    return BytesPerToken(likely / SPREAD, likely, likely * SPREAD, source)


def _encoded(codec: Codec, vocab_size: int, tokens: int, entropy: float) -> float:
    """Bytes per token."""
    rng = np.random.default_rng(0)
    wanted_T = np.clip(rng.gamma(1.2, entropy / 1.2, tokens), 0.01, 0.97 * math.log(vocab_size))
    wanted_T *= entropy / wanted_T.mean()
    # One id stands for each stretch of ranks, another one for every token.
    first_I = np.unique(np.rint(np.geomspace(1, vocab_size + 1, _IDS)).astype(np.int64)) - 1
    width_I = np.diff(first_I)
    prior_I = torch.from_numpy(np.log(np.log((first_I[1:] + 3) / (first_I[:-1] + 3)))).float()
    generator = torch.Generator().manual_seed(0)
    parts, entropies, labels = [], [], []
    for first in range(0, tokens, _CHUNK):
        wanted = torch.from_numpy(wanted_T[first : first + _CHUNK]).float()
        noise_TI = torch.randn(len(wanted), len(width_I), generator=generator)
        logits_TI = _with_entropy(prior_I + NOISE * noise_TI, wanted)
        lse_T = logits_TI.logsumexp(-1)
        positions_T = torch.arange(first, first + len(wanted))
        atoms, entropy_T = codec.select(
            logits_TI, lse_T, seed=0, sample_ids_T=torch.zeros_like(positions_T), positions_T=positions_T
        )
        places = atoms.ids_N.numpy()
        ids = first_I[places] + (rng.random(len(places)) * width_I[places]).astype(np.int64)
        parts.append(atoms._replace(ids_N=torch.from_numpy(ids).int()))
        entropies.append(entropy_T)
        drawn_T1 = torch.multinomial((logits_TI - lse_T[:, None]).exp(), 1, generator=generator)
        labels.append(logits_TI.gather(1, drawn_T1)[:, 0] - lse_T)
    encoded = record.encode(
        Atoms.cat(parts),
        torch.cat(labels).numpy(),
        torch.cat(entropies).numpy(),
        np.ones(tokens, np.bool_),
        tokens,
        np.arange(vocab_size),
        codec,
    )
    return float(encoded.ends[-1]) / tokens


def _with_entropy(logits_TV: torch.Tensor, wanted_T: torch.Tensor) -> torch.Tensor:
    """Logits scaled, row by row, until softmax has the wanted entropies (nats)."""
    low_T, high_T = torch.full_like(wanted_T, 1e-3), torch.full_like(wanted_T, 30.0)
    for _ in range(12):
        scale_T = (low_T * high_T).sqrt()
        logp_TV = (logits_TV * scale_T[:, None]).log_softmax(-1)
        too_flat_T = -(logp_TV.exp() * logp_TV).sum(-1) > wanted_T
        low_T = torch.where(too_flat_T, scale_T, low_T)
        high_T = torch.where(too_flat_T, high_T, scale_T)
    return logits_TV * (low_T * high_T).sqrt()[:, None]
