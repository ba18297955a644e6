"""Differences between two cache headers as sentences, one for each key."""

from collections.abc import Iterator
from typing import Any

from distill.config import values

_NAMES = {
    "codec": "cache.codec",
    "stream.batch": "teacher.train.batch",
    "stream.corpora": "data.corpora",
    "stream.planned": "the number of samples that the teacher trains on (teacher.train.steps x batch)",
    "stream.seed": "data.seed",
}
"""Names that keys of the header have in a run's configuration, where they differ."""


def lines(here: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    """A sentence for each difference between a cache's header and a run."""
    for key, a, b in values.differences(here, wanted):
        if key == "stream":
            which = "records the stream of a teacher in training" if a else "records no teacher's stream"
            yield f"it {which}, this run {'trains one' if b else 'trains none'}: choose another cache"
        else:
            head, dot, rest = key.partition(".")
            name = _NAMES.get(key) or f"{_NAMES.get(head, head)}{dot}{rest}"
            yield f"{name} is {shown(key, a)} in the cache, {shown(key, b)} in this run"


def shown(key: str, value: Any) -> str:
    """The value of a header's key in a message."""
    if key == "stream.corpora" and value:
        return ", ".join(f"{name} ({samples} samples, weight {weight})" for name, samples, weight in value)
    return values.shown(value, quoted=True)
