"""The cache: writers killed, bits flipped."""

from __future__ import annotations

from typing import Any

from tests.crash import _flips, _kills


def run(kills: int, flips: int, seed: int, progress: Any) -> tuple[dict[str, Any], list[str]]:
    """Figures, and every problem found in words; none: nothing was lost and nothing went unnoticed."""
    killed, lost = _kills.run(kills, seed, progress)
    flipped, unnoticed = _flips.run(flips, seed, progress)
    return {**killed, **flipped}, lost + unnoticed
