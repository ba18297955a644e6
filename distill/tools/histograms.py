"""Histograms over the tokens of some samples: how sure the teacher was, and what of it is stored."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.cache.header import CacheHeader
from distill.cache.reader import CacheReader
from distill.cache.shard import Shard
from distill.cache.store import Store
from distill.cache.view import View, asked, open_view
from distill.config.errors import CacheError
from distill.config.terminal import advancing
from distill.config.units import grouped

BINS = 20
_BLOCK = 16


def histograms(store: Store, count: int) -> dict[str, Any]:
    """Histograms from up to `count` samples, always the same ones of a given view.

    Each has `edges` [bins + 1], `counts` [bins] and `mean`: `entropy` (nats), `label` (-log p of the label, nats),
    `mass` (sum of the stored probabilities), `atoms` (per token; the edges are whole numbers).

    Raises:
        CacheError: damage.
    """
    view = open_view(store, CacheHeader.load(store))
    reader = CacheReader(store.root, view.pin)
    chosen = _choose(view, count)
    if not len(chosen):
        raise CacheError(f"{store.root}: holds no records yet")
    values: dict[str, list[np.ndarray]] = {name: [] for name in ("entropy", "label", "mass", "atoms")}
    with advancing("decode", len(chosen), grouped) as advance:
        for first in range(0, len(chosen), _BLOCK):
            ids = chosen[first : first + _BLOCK]
            targets = reader.read(ids, reader.digests(ids)).targets
            valid = targets.covered_T.numpy()
            probs = targets.probs_TK.double().numpy()[valid]
            values["entropy"].append(targets.entropy_T.numpy()[valid])
            values["label"].append(-targets.label_logprob_T.numpy()[valid])
            values["mass"].append(probs.sum(-1))
            values["atoms"].append((probs > 0).sum(-1))
            advance(len(ids))
    flat = {name: np.concatenate(parts).astype(np.float64) for name, parts in values.items()}
    most = int(flat["atoms"].max(initial=1))
    step = -(-most // BINS)
    edges = {
        "entropy": np.linspace(0, math.log(reader.header.vocab_size), BINS + 1),
        "label": np.linspace(0, max(float(flat["label"].max(initial=0)), 1e-3), BINS + 1),
        # 1, where most of it lies, is the middle of a bin.
        "mass": np.arange(-0.05, max(1.95, float(flat["mass"].max(initial=0))) + 0.15, 0.1),
        "atoms": np.arange(0, most + step + 1, step, dtype=np.float64),
    }
    return {"samples": len(chosen), "tokens": len(flat["mass"])} | {
        name: {
            "edges": edges[name].tolist(),
            "counts": np.histogram(flat[name], edges[name])[0].tolist(),
            "mean": float(flat[name].mean()) if len(flat[name]) else None,
        }
        for name in values
    }


def _choose(view: View, count: int) -> NDArray[np.int64]:
    """Ids of up to `count` samples, by records drawn evenly from all shards."""
    names, rows = asked(view, View.origins)[1]
    rows = rows[rows["number"] == 0]
    ends = np.cumsum(rows["shard_samples"], dtype=np.int64)
    if not len(ends):
        return np.zeros(0, np.int64)
    drawn = (
        np.unique(np.random.default_rng(0).integers(0, ends[-1], count)) if count < ends[-1] else np.arange(ends[-1])
    )
    shards = np.searchsorted(ends, drawn, side="right")
    ids = [np.empty(0, np.int64)]
    for number in np.unique(shards).tolist():
        row = rows[number]
        here = Shard(view.store, view.header, *names.shard(row)).columns.sample_ids
        ids.append(here[drawn[shards == number] - (ends[number] - len(here))])
    return np.unique(np.concatenate(ids))
