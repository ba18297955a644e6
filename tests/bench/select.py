"""Selecting atoms against the head that made the logits, at Llama 4's vocabulary: V = 202,048, hidden 5,120, 64 tokens.

The log-sum-exp is the loss's own and not counted.
"""

from __future__ import annotations

import torch

from distill.cache import make_codec
from distill.config.registry import CODECS
from distill.config.schema import CodecConfig
from tests.bench._timing import in_turns, ratio

T, D, V = 64, 5120, 202_048


def run() -> dict[str, float]:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(V, D, generator=g) * 0.02
    # Logits like a trained model's: peaked, with a long tail.
    hidden = torch.randn(T, D, generator=g) * 4.0
    logits = hidden @ weight.T
    lse = logits.logsumexp(-1)
    ids = torch.arange(T)

    def select(name: str) -> None:
        make_codec(CodecConfig(name=name), V).select(logits, lse, seed=0, sample_ids_T=ids, positions_T=ids)

    functions = {name: lambda name=name: select(name) for name in CODECS.names}
    seconds = in_turns({"head": lambda: hidden @ weight.T, **functions}, rounds=5)
    return {f"{name}_over_head": ratio(seconds, name, "head") for name in CODECS.names}
