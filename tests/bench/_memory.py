"""Memory of one forward and backward pass over one row of N tokens: `python -m tests.bench._memory N` prints MiB.

Hidden 256, 4 layers (two MoE of 8 experts, one without positions, three in chunks of 8,192), V = 512, fp32, through the
fused head. A process of its own: the figure is what the pass adds to the most that the process held before.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from distill.config.schema import ModelConfig
from distill.model import Transformer
from losses import mixed_loss

CONFIG = ModelConfig(
    vocab_size=512,
    hidden_size=256,
    layers=4,
    heads=8,
    kv_heads=2,
    head_dim=32,
    expert_hidden=256,
    dense_hidden=512,
    experts=8,
    moe_step=2,
)


def peak_mb(tokens: int) -> float:
    """MiB that forward and backward of one row of `tokens` tokens take, measured in a fresh process."""
    command = [sys.executable, "-m", "tests.bench._memory", str(tokens)]
    # Tensors go back to the system when they are freed: what counts is what lives at one time.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return float(done.stdout)


def _train_once(model: Transformer, tokens: int) -> None:
    ids_BS = torch.randint(CONFIG.vocab_size, (1, tokens))
    labels_T = ids_BS.flatten().roll(-1)

    def head(hidden_TD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        return mixed_loss(hidden_TD, weight_VD, labels_T, torch.ones(tokens)).loss_sum

    loss_sum, _ = model(ids_BS, head_fn=head)
    loss_sum.backward()


def most_mb() -> float:
    """MiB, the most that this process has held."""
    # Not getrusage's ru_maxrss: a started process inherits that of its parent.
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]


if __name__ == "__main__":
    torch.manual_seed(0)
    trained = Transformer(CONFIG)
    _train_once(trained, 64)  # what a first pass loads and keeps is not the row's
    before = most_mb()
    _train_once(trained, int(sys.argv[1]))
    print(most_mb() - before)
