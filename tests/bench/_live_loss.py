"""The dearest loss of a live teacher, Jensen-Shannon: in chunks by `losses.dense`, and plainly on whole logits.

`python -m tests.bench._live_loss chunked` prints the MiB that forward and backward add in a process of their own.
V = 202,048, hidden 256 of student and teacher, 256 tokens, chunks of 64, fp32.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch

from losses import fixed, head_loss
from losses.dense import Dense
from losses.divergences import jensen_shannon
from tests.bench._memory import most_mb

T, D, V, CHUNK = 256, 256, 202_048, 64


def passes() -> dict[str, Callable[[], object]]:
    """Forward and backward of either form, on the same problem."""
    g = torch.Generator().manual_seed(0)
    student, teacher = ([torch.randn(n, D, generator=g).mul_(0.1) for n in (T, V)] for _ in range(2))
    for leaf in student:
        leaf.requires_grad_()
    labels = torch.randint(V, (T,), generator=g)
    half = torch.full((T,), 0.5)

    def chunked() -> None:
        rows = Dense(labels, fixed(half, half), *teacher, partial(jensen_shannon, beta=0.5))
        head_loss(*student, rows, chunk=CHUNK).loss_sum.backward()

    def plain() -> None:
        logq = torch.log_softmax(student[0] @ student[1].T, -1)
        logp = torch.log_softmax(teacher[0] @ teacher[1].T, -1)
        p, q = logp.exp(), logq.exp()
        logm = ((p + q) / 2).log()
        soft_T = 0.5 * (p * (logp - logm)).sum(-1) + 0.5 * (q * (logq - logm)).sum(-1)
        hard_T = torch.nn.functional.nll_loss(logq, labels, reduction="none")
        (0.5 * hard_T + 0.5 * soft_T).sum().backward()

    return {"chunked": chunked, "plain": plain}


def peak_mb(form: str) -> float:
    """MiB that forward and backward take beyond the problem itself."""
    command = [sys.executable, "-m", "tests.bench._live_loss", form]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


if __name__ == "__main__":
    run = passes()[sys.argv[1]]
    before = most_mb()
    run()
    print(most_mb() - before)
