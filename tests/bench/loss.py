"""What soft targets cost over hard labels in the fused head, and the fused head against PyTorch's own losses.

V = 202,048, hidden 512, 12 atoms a token, fp32, one thread: 4,096 tokens, and 2,048 against the dense form, which needs
15 GB for them. Passes run in turns, each in a process of its own that measures CPU seconds and its peak (`_loss_pass`).
And the dearest loss of a live teacher (`_live_loss`) against plain PyTorch.
"""

from __future__ import annotations

import statistics

import torch

from tests.bench._live_loss import passes, peak_mb
from tests.bench._loss_pass import measured
from tests.bench._timing import in_turns, ratio

TOKENS, DENSE_TOKENS, ROUNDS = 4096, 2048, 3


def run() -> dict[str, float]:
    forms = {"hard": TOKENS, "mixed": TOKENS, "mixed_half": DENSE_TOKENS, "dense": DENSE_TOKENS}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch 2.13
        forms["torch"] = TOKENS
    turns = [{name: measured(name.split("_")[0], tokens) for name, tokens in forms.items()} for _ in range(ROUNDS)]

    def over(one: str, other: str, which: int) -> float:
        return statistics.median(turn[one][which] / turn[other][which] for turn in turns)

    results = {
        "mixed_over_hard_time": over("mixed", "hard", 0),
        "mixed_over_hard_memory": over("mixed", "hard", 1),
        "dense_over_mixed_time": over("dense", "mixed_half", 0),
        "dense_over_mixed_memory": over("dense", "mixed_half", 1),
        "mixed_seconds": statistics.median(turn["mixed"][0] for turn in turns),
        "mixed_mb": statistics.median(turn["mixed"][1] for turn in turns),
    }
    if "torch" in forms:
        results["mixed_over_torch_time"] = over("mixed", "torch", 0)
        results["mixed_over_torch_memory"] = over("mixed", "torch", 1)
    live = in_turns(passes(), rounds=3)
    results["live_over_plain"] = ratio(live, "chunked", "plain")
    results["live_memory_over_plain"] = peak_mb("chunked") / peak_mb("plain")
    return results
