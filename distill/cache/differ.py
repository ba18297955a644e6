"""Differences between two cache headers as sentences, one for each key."""

from collections.abc import Iterator
from typing import Any

_NAMES = {
    "codec": "cache.codec",
    "stream.batch": "teacher.train.batch",
    "stream.corpora": "data.corpora",
    "stream.planned": "the number of samples that the teacher trains on (teacher.train.steps x batch)",
    "stream.seed": "data.seed",
}
"""Names that keys of the header have in a run's configuration, where they differ."""


def pairs(here: dict[str, Any], there: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted key and both values, wherever the JSON of two headers differs; None: one of them has no such key."""
    for key in dict.fromkeys([*here, *there]):
        a, b = here.get(key), there.get(key)
        if a and b and isinstance(a, dict) and isinstance(b, dict):
            # Another codec has parameters of its own.
            same = a.get("name") == b.get("name")
            yield from pairs(a, b, f"{prefix}{key}.") if same else [(f"{prefix}{key}.name", a["name"], b["name"])]
        elif a != b:
            yield f"{prefix}{key}", a, b


def lines(here: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    """A sentence for each difference between a cache's header and a run."""
    for key, a, b in pairs(here, wanted):
        if key == "stream":
            which = "records the stream of a teacher in training" if a else "records no teacher's stream"
            yield f"it {which}, this run {'trains one' if b else 'trains none'}: choose another cache"
        else:
            head, dot, rest = key.partition(".")
            name = _NAMES.get(key) or f"{_NAMES.get(head, head)}{dot}{rest}"
            yield f"{name} is {shown(a)} in the cache, {shown(b)} in this run"


def shown(value: Any) -> str:
    """A value in a message."""
    if value is None or value == {}:
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(each)}" for name, each in value.items())
    if isinstance(value, list) and value and all(isinstance(each, list) and len(each) == 3 for each in value):
        return ", ".join(f"{name} ({samples} samples, weight {weight})" for name, samples, weight in value)
    return repr(value)
