"""What length does to a model: its loss by position, and whether it finds a needle in a haystack."""

from __future__ import annotations

from typing import Any

from distill.model import Transformer
from distill.run.run import Run
from student import needle_test as needle
from student.evaluate import Evaluation


def figures(run: Run, model: Transformer, result: Evaluation) -> dict[str, Any]:
    """Entries of the run's summary, some of them only for the report's charts. Collective."""
    e = run.config.evaluate
    chunk_size, trained_tokens = model.config.chunk_size, e.trained_tokens or run.config.data.sample_tokens
    found: dict[str, Any] = {}
    if e.needle.lengths:
        run.tracker.message(f"needle in a haystack: lengths {', '.join(map(str, e.needle.lengths))}")
        counts = needle.find(model, run.data.tokenizer, e.needle, e.batch, run.config.seed, run.dist)
        found |= needle.figures(counts, e.needle, chunk_size, trained_tokens)
    first, last, loss, tokens = map(list, zip(*result.by_position))
    found["loss_by_position"] = {
        "first": first,
        "last": last,
        "loss": loss,
        "tokens": tokens,
        "chunk_size": chunk_size,
        "trained_tokens": trained_tokens,
    }
    return found
