"""Needle in a haystack: how often a model's greedy continuation is the answer that its text states."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill.config import stop
from distill.config.schema import NeedleTestConfig
from distill.data.needle import trial
from distill.data.tokenizer import Tokenizer
from distill.engine.dist import Dist
from distill.model import Transformer
from distill.model.decode import generate


class NeedleCounts(NamedTuple):
    """Counts, lengths in rows and depths in columns."""

    hits_ND: Tensor
    trials_ND: Tensor
    hits_across_ND: Tensor
    """Of the trials whose fact lies wholly in an earlier chunk than the end of the question."""
    across_ND: Tensor


def find(
    model: Transformer, tokenizer: Tokenizer, config: NeedleTestConfig, batch: int, seed: int, dist: Dist
) -> NeedleCounts:
    """Tries every length and depth; each rank takes a share of the trials. Collective.

    Args:
        batch: texts at one time.

    Raises:
        DataError: a length that has no room for facts and question, or that the model does not admit.
    """
    counts = torch.zeros(4, len(config.lengths), len(config.depths), dtype=torch.float64, device=dist.device)
    chunk = model.config.chunk_size
    for row, length in enumerate(config.lengths):
        for column, depth in enumerate(config.depths):
            mine = range(dist.rank, config.trials, dist.world)
            trials = [trial(tokenizer, length, depth, config.facts, (seed, length, depth, n)) for n in mine]
            for part in stop.checked(trials[start : start + batch] for start in range(0, len(trials), batch)):
                prompts = [torch.tensor(t.prompt, device=dist.device) for t in part]
                answers = generate(model, prompts, max(len(t.answer) for t in part), eos_ids=[])
                for t, ids in zip(part, answers):
                    hit = ids[: len(t.answer)].tolist() == t.answer
                    across = chunk is not None and t.stated // chunk < (len(t.prompt) - 1) // chunk
                    counts[:, row, column] += counts.new_tensor([hit, True, hit and across, across])
    return NeedleCounts(*dist.sum(counts).cpu())


def entries(
    counts: NeedleCounts, config: NeedleTestConfig, chunk_size: int | None, trained_tokens: int
) -> dict[str, Any]:
    """Summary entries: shares within the trained length and by length, and the grid that the report draws."""
    within_N = torch.tensor([length <= trained_tokens for length in config.lengths])
    shares = {
        "needle_accuracy": _share(counts.hits_ND[within_N], counts.trials_ND[within_N]),
        "needle_accuracy_across_chunks": _share(counts.hits_across_ND[within_N], counts.across_ND[within_N]),
    }
    grid = {
        "lengths": list(config.lengths),
        "depths": list(config.depths),
        "accuracy": (counts.hits_ND / counts.trials_ND).tolist(),
        "accuracy_by_length": (counts.hits_ND.sum(1) / counts.trials_ND.sum(1)).tolist(),
        "trials": config.trials,
        "facts": config.facts,
        "chunk_size": chunk_size,
        "trained_tokens": trained_tokens,
    }
    return {name: share for name, share in shares.items() if share is not None} | {"needle": grid}


def _share(hits: Tensor, of: Tensor) -> float | None:
    return (hits.sum() / of.sum()).item() if of.sum() else None
