"""Bytes per token of records, by codec, its parameter, vocabulary and the rows' entropy: the table of `estimate`.

1,024 rows of the yardstick, one sample, their exponents scaled to each entropy, are put through the real codec and
coder. Writes distill/tools/bytes_per_token.json.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.cache import Atoms, make_codec, record
from distill.config.schema import CodecConfig
from tests.bench._yardstick import VOCAB, rows

COMMAND = "make bench ONLY=record_bytes"
TABLE = Path(__file__).parents[2] / "distill" / "tools" / "bytes_per_token.json"
TOKENS = 1024
VOCABULARIES = (1024, 32_768, VOCAB)
ENTROPIES = (0.1, 0.6, 1.9, 3.2, 5.0, 8.0)
"""Nats; those that a vocabulary cannot have are left out, and 90 % of its most is added."""
PARAMETERS = {
    "systematic": ("draws", (5, 10, 20, 50, 200)),
    "threshold": ("tau", (0.004, 0.02, 0.05, 0.12, 0.3)),
    "multinomial": ("draws", (5, 10, 20, 50, 200)),
    "topk": ("k", (1, 4, 12, 50, 200)),
}
EXPONENTS = (1.1, 4.0)
"""Of the yardstick's rows, before they are scaled."""


def run() -> dict[str, float]:
    figures, vocabularies = {}, []
    for vocab in VOCABULARIES:
        most = 0.9 * math.log(vocab)
        entropies = [*(entropy for entropy in ENTROPIES if entropy < most), most]
        columns = [measure(vocab, entropy) for entropy in entropies]
        sizes = {name: [[column[name, value] for column in columns] for value in values]
                 for name, (_, values) in PARAMETERS.items()}  # fmt: skip
        vocabularies.append({"vocab_size": vocab, "entropy": [round(each, 3) for each in entropies]} | sizes)
        for (name, value), entropy in itertools.product(columns[0], entropies):
            column = columns[entropies.index(entropy)]
            figures[f"V {vocab}, {name} {value}, {entropy:.1f} nats"] = column[name, value]
    parameters = {name: values for name, (_, values) in PARAMETERS.items()}
    lines = [json.dumps(each).replace('], "', '],\n   "') for each in vocabularies]
    TABLE.write_text(
        f'{{"command": {json.dumps(COMMAND)},\n "parameters": {json.dumps(parameters)},\n "vocabularies": [\n  '
        + ",\n  ".join(lines)
        + "\n ]}\n"
    )
    return figures


def measure(vocab: int, entropy: float) -> dict[tuple[str, float], float]:
    """Bytes per token of every codec at rows of this mean entropy."""
    settings = [(name, value) for name, (_, values) in PARAMETERS.items() for value in values]
    codecs = {
        (name, value): make_codec(CodecConfig(name, **{PARAMETERS[name][0]: value}), vocab) for name, value in settings
    }
    parts: dict[tuple[str, float], list[Atoms]] = {key: [] for key in settings}
    label_T, entropy_T = np.empty(TOKENS, np.float32), np.empty(TOKENS, np.float32)
    g, first = torch.Generator().manual_seed(1), 0
    for p_TV in rows(TOKENS, 0, exponents=scaled(vocab, entropy), vocab=vocab):
        place_T, here = torch.arange(first, first + len(p_TV)), slice(first, first + len(p_TV))
        logits_TV = p_TV.log().float()
        labels_T1 = torch.multinomial(p_TV.float(), 1, generator=g)
        label_T[here] = logits_TV.gather(1, labels_T1)[:, 0].numpy()
        for key, codec in codecs.items():
            atoms, stat_T = codec.select(
                logits_TV, torch.zeros(len(p_TV)), seed=0, sample_ids_T=torch.zeros_like(place_T), positions_T=place_T
            )
            parts[key].append(atoms)
            entropy_T[here] = stat_T.numpy()
        first += len(p_TV)
        print(f"\r  V {vocab}, {entropy:.1f} nats: {first} of {TOKENS} tokens", end="", flush=True)
    print("\r", end="")
    valid_T, rank_of_id = np.ones(TOKENS, np.bool_), np.arange(vocab)
    return {
        key: round(
            float(
                record.encode(Atoms.cat(parts[key]), label_T, entropy_T, valid_T, TOKENS, rank_of_id, codecs[key]).ends[
                    -1
                ]
            )
            / TOKENS,
            3,
        )
        for key in settings
    }


def scaled(vocab: int, entropy: float) -> tuple[float, float]:
    """The yardstick's exponents, times what gives rows of this mean entropy."""
    g = torch.Generator().manual_seed(0)
    spread_T1, q_T1 = torch.rand(2, 64, 1, generator=g, dtype=torch.float64)
    log_rank_TV = (torch.arange(1, vocab + 1, dtype=torch.float64) + q_T1).log()
    s_T1 = EXPONENTS[0] + spread_T1 * (EXPONENTS[1] - EXPONENTS[0])

    def mean_entropy(scale: float) -> float:
        logp_TV: Tensor = (log_rank_TV * (-scale * s_T1)).log_softmax(-1)
        return float(-(logp_TV.exp() * logp_TV).sum(1).mean())

    low, high = 1e-3, 100.0
    for _ in range(20):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if mean_entropy(middle) > entropy else (low, middle)
    return low * EXPONENTS[0], low * EXPONENTS[1]
