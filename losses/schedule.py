"""A number that follows a schedule over the steps of a run: a learning rate, or the largest alpha."""

import math


def schedule(
    kind: str,
    step: int,
    steps: int,
    *,
    peak: float,
    final: float,
    warmup: float,
    decay: float,
    first: int = 0,
) -> float:
    """Value for the update that follows `step` finished steps of `steps`.

    Rises linearly to `peak` over the first `warmup` steps; then constant, linear or cosine to `final` at the end, or
    (wsd: warm-up, stable, decay) at `peak` and linear to `final` over the last `decay` steps, or (step) `peak` and
    `final` at once in these.

    Args:
        first: what counts as rising at step 0: 0 begins at 0, 1 one warm-up step above it.

    Source: wsd for alpha, tied to a learning rate of the same shape, arXiv 2410.16215 section 3.4.
    """
    if step < warmup:
        return peak * (step + first) / warmup
    if kind == "constant":
        return peak
    if kind == "step":
        return peak if step < steps - decay else final
    if kind == "wsd":
        left = min(1.0, (steps - step) / decay) if decay else 1.0
    else:
        progress = (step - warmup) / max(1, steps - warmup)
        left = 1.0 - progress if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return final + (peak - final) * left
