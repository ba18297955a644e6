"""One pass of a loss over the vocabulary, forward and backward, in a process of its own.

`python -m tests.bench._loss_pass FORM TOKENS` prints CPU seconds, and the MiB that the pass adds to the most that the
process held before. V = 202,048, hidden 512, 12 atoms a token, fp32, one thread. Forms: `mixed` and `hard` are ours,
`torch` is linear_cross_entropy with its own choice of chunks, on labels alone, and `dense` is cross entropy and KL on
whole logits with a dense target.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from losses import mixed_loss
from tests.bench._memory import most_mb

D, V, K = 512, 202_048, 12


def measured(form: str, tokens: int) -> tuple[float, float]:
    """CPU seconds and MiB, in a process of its own."""
    # Tensors go back to the system when they are freed: what counts is what lives at one time.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 18), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.bench._loss_pass", form, str(tokens)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    seconds, mebibytes = map(float, done.stdout.split())
    return seconds, mebibytes


def loss_of(form: str, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    tokens, vocab = len(hidden), len(weight)
    g = torch.Generator().manual_seed(1)
    labels, ids = torch.randint(vocab, (tokens,), generator=g), torch.randint(vocab, (tokens, K), generator=g)
    probs, half = torch.softmax(torch.randn(tokens, K, generator=g), -1), torch.full((tokens,), 0.5)
    if form == "mixed":
        return mixed_loss(hidden, weight, labels, half, ids, probs, half).loss_sum
    if form == "hard":
        return mixed_loss(hidden, weight, labels, 2 * half).loss_sum
    if form == "torch":
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options)
    target = torch.zeros(tokens, vocab).scatter_add_(1, ids, probs)
    logits = hidden @ weight.T
    soft = F.kl_div(F.log_softmax(logits, -1), target, reduction="sum")
    return 0.5 * F.cross_entropy(logits, labels, reduction="sum") + 0.5 * soft


def main(form: str, tokens: int) -> None:
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, D).mul_(0.1).requires_grad_() for n in (tokens, V))
    small = [x[:64].detach().clone().requires_grad_() for x in (hidden, weight)]
    loss_of(form, *small).backward()  # what a first pass loads and keeps is not the pass's
    before, began = most_mb(), time.process_time()
    loss_of(form, hidden, weight).backward()
    print(time.process_time() - began, most_mb() - before)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
