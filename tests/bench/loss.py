"""What soft targets cost over hard labels in the fused head, and the fused head against PyTorch's dense losses.

V = 202,048, hidden 512, 512 tokens, 12 atoms a token, chunks of 128, forward and backward, fp32; and the dearest loss
of a live teacher (`_live_loss`) against plain PyTorch, in time and memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from losses import mixed_loss
from tests.bench._live_loss import passes, peak_mb
from tests.bench._timing import in_turns, ratio

T, D, V, K, CHUNK = 512, 512, 202_048, 12, 128


def run() -> dict[str, float]:
    g = torch.Generator().manual_seed(0)
    hidden = (torch.randn(T, D, generator=g) * 0.1).requires_grad_()
    weight = (torch.randn(V, D, generator=g) * 0.1).requires_grad_()
    labels = torch.randint(V, (T,), generator=g)
    ids = torch.randint(V, (T, K), generator=g)
    probs = torch.softmax(torch.randn(T, K, generator=g), -1)
    half = torch.full((T,), 0.5)

    def hard() -> None:
        mixed_loss(hidden, weight, labels, torch.ones(T), chunk=CHUNK).loss_sum.backward()

    def mixed() -> None:
        mixed_loss(hidden, weight, labels, half, ids, probs, half, chunk=CHUNK).loss_sum.backward()

    def dense() -> None:
        logp = torch.log_softmax(hidden @ weight.T, -1)
        hard_T = F.nll_loss(logp, labels, reduction="none")
        (0.5 * hard_T - 0.5 * (probs * logp.gather(-1, ids)).sum(-1)).sum().backward()

    seconds = in_turns({"hard": hard, "mixed": mixed, "dense": dense}, rounds=5)
    live = in_turns(passes(), rounds=3)
    return {
        "live_over_plain": ratio(live, "chunked", "plain"),
        "live_memory_over_plain": peak_mb("chunked") / peak_mb("plain"),
        "mixed_over_hard": ratio(seconds, "mixed", "hard"),
        "mixed_over_dense": ratio(seconds, "mixed", "dense"),
        "largest_logits_mb": CHUNK * V * 4 / 2**20,
        "dense_logits_mb": T * V * 4 / 2**20,
    }
