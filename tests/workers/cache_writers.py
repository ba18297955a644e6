"""A small teacher for the cache's tests: every target of a sample is a function of the sample's id."""

from typing import NamedTuple

import numpy as np
import torch

from distill.cache import Atoms, CacheHeader, CacheWriter, make_codec
from distill.config.schema import CodecConfig

S, V, SAMPLES = 16, 64, 40


class CapturedBatch(NamedTuple):
    ids: np.ndarray
    digests: np.ndarray
    atoms: Atoms
    label_logprob: torch.Tensor
    entropy: torch.Tensor
    valid: torch.Tensor


def header(codec=None, **changes) -> CacheHeader:
    fields = dict(vocab_size=V, tokenizer="tok", corpus="corp", sample_tokens=S, samples=SAMPLES, seed=5)
    return CacheHeader(**fields | {"codec": codec or CodecConfig(), "stream": {"seed": 0, "steps": [1, 2]}} | changes)


def digests(ids) -> np.ndarray:
    return np.asarray(ids, np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def batch(ids, codec=None, vocab=V, step=0) -> CapturedBatch:
    """Targets of the samples `ids`; another step is another teacher."""
    rows = []
    for i in ids:
        rng = np.random.default_rng([int(i), step])
        rows.append(rng.standard_normal((S, vocab)) * rng.uniform(0.5, 4, (S, 1)))
    logits_TV = torch.from_numpy(np.concatenate(rows)).float()
    lse_T = logits_TV.logsumexp(-1)
    logp_TV = logits_TV - lse_T[:, None]
    atoms, entropy = make_codec(codec or CodecConfig(), vocab).select(
        logits_TV,
        lse_T,
        seed=5,
        sample_ids_T=torch.as_tensor(np.repeat(ids, S)),
        positions_T=torch.arange(S).repeat(len(ids)),
    )
    valid = torch.arange(len(ids) * S) % S != S - 1
    return CapturedBatch(np.asarray(ids), digests(ids), atoms, logp_TV[:, 3], entropy, valid)


def put(writer: CacheWriter, ids, codec=None, vocab=V, step=0, teacher="t") -> bool:
    return writer.put(*batch(ids, codec, vocab, step), step=step, tokens_seen=step * 100, teacher=teacher)


def write_until_killed(folder, ready, repeat: int) -> None:
    """Writes sample after sample, for ever; sets `ready` when it begins."""
    torch.set_num_threads(1)
    with CacheWriter(folder, header(), writer="w", shard_samples=2) as writer:
        ready.set()
        step = repeat * 1_000_000
        while True:
            for i in range(SAMPLES):
                put(writer, [i], step=0)
            step += 1


def same_row(targets, t, ids_V, probs_V) -> bool:
    """Token t of SoftTargets has these probabilities at these ids and nothing else."""
    got = {int(i): float(p) for i, p in zip(targets.ids_TK[t], targets.probs_TK[t]) if p > 0}
    return got == {int(i): float(p) for i, p in zip(ids_V, probs_V) if p > 0}
