"""Who made the records of a shard, and when. No torch."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Origin:
    """The teacher that made some records of a shard, and the steps at which it did."""

    teacher: str
    """Identity of the teacher."""
    source: str
    """capture, backfill or import."""
    first_step: int
    last_step: int
    samples: int
    tokens: int
    """Tokens that have a target."""
    tokens_seen: int
    """Tokens that the teacher had trained on before the last of these samples."""
    loss: float | None
    """Teacher's mean label loss over its shard, nats; null without tokens."""
    seen_before: bool
    """The teacher had trained on these samples."""
    flops_per_token: float
    """FLOPs of the teacher's forward pass; 0: not known."""


SOURCES = ("capture", "backfill", "import")


def summed(origins: Iterable[Origin]) -> list[Origin]:
    """One for each teacher, source, `seen_before` and cost, in the order of first steps.

    Samples and tokens are summed; the loss is the mean over tokens.
    """
    groups: dict[tuple[str, str, bool, float], list[Origin]] = {}
    for each in origins:
        groups.setdefault((each.teacher, each.source, each.seen_before, each.flops_per_token), []).append(each)
    sums = []
    for parts in groups.values():
        known = [each for each in parts if each.loss is not None and each.tokens]
        tokens = sum(each.tokens for each in known)
        loss = sum(each.tokens * each.loss for each in known if each.loss is not None) / tokens if tokens else None
        sums.append(
            dataclasses.replace(
                parts[0],
                first_step=min(each.first_step for each in parts),
                last_step=max(each.last_step for each in parts),
                samples=sum(each.samples for each in parts),
                tokens=sum(each.tokens for each in parts),
                tokens_seen=max(each.tokens_seen for each in parts),
                loss=loss,
            )
        )
    return sorted(sums, key=lambda each: (each.first_step, each.teacher, each.source, each.seen_before))
