"""What the targets of a cache cost, or would have cost: floating-point operations by where records come from.

Starts without torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.cache.origins import Origin

TRAINING = 3
"""Forward and backward pass together cost three forward passes."""


def flop_ledger(origins: Iterable[Origin], sample_tokens: int) -> dict[str, Any]:
    """Sums over the published shards of one cache, or of all shards of several with samples of equal length.

    A pass runs over every token of a sample, those without a label too; the numbers of tokens are of those that have a
    target. A sample that was published twice was paid for twice and counts twice. Shards that a compaction replaced
    are gone, and with them what their records cost.

    Args:
        origins: `CacheReader.summary`.
        sample_tokens: S of the cache's header.

    Returns:
        captured_tokens, backfilled_tokens, imported_tokens: by source.
        saved_tflops: forward passes that capture took from training; a labelling pass of its own would have cost this.
        training_tflops: what the teacher's training on these samples cost, paid in any case.
        backfill_tflops: forward passes made for targets alone.
        unpriced_tokens: captured or backfilled, by a teacher whose cost was not recorded; in no other sum of TFLOPs.
        All TFLOPs are 10^12 operations, a multiply-add being 2.
    """
    tokens = {"capture": 0, "backfill": 0, "import": 0}
    tflops = {"capture": 0.0, "backfill": 0.0, "import": 0.0}
    unpriced = 0
    for origin in origins:
        tokens[origin.source] += origin.tokens
        tflops[origin.source] += origin.samples * sample_tokens * origin.flops_per_token / 1e12
        if not origin.flops_per_token and origin.source != "import":
            unpriced += origin.tokens
    return {
        "captured_tokens": tokens["capture"],
        "saved_tflops": tflops["capture"],
        "training_tflops": TRAINING * tflops["capture"],
        "backfilled_tokens": tokens["backfill"],
        "backfill_tflops": tflops["backfill"],
        "imported_tokens": tokens["import"],
        "unpriced_tokens": unpriced,
    }
