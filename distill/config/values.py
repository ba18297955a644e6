"""Values in messages, and the values in which two configurations or headers differ."""

from collections.abc import Iterator
from enum import Enum
from typing import Any, NamedTuple


def shown(value: Any, *, quoted: bool = False) -> str:
    """A value as a user would write it; `quoted`: with the quotes of a text, which may hold spaces."""
    if isinstance(value, dict) and value:
        return ", ".join(f"{name} {shown(each, quoted=quoted)}" for name, each in value.items())
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, Enum):
        return str(value.value)
    if value in ({}, [], ""):
        return "empty"
    return repr(value) if quoted else str(value)


class Difference(NamedTuple):
    """A dotted key and its values here and there; None: there is no such key."""

    key: str
    here: Any
    there: Any


def differences(here: dict[str, Any], there: dict[str, Any], prefix: str = "") -> Iterator[Difference]:
    """Wherever two nested dictionaries differ; of parts with another `name` that alone: the rest belongs to it."""
    for key in dict.fromkeys([*here, *there]):
        a, b = here.get(key), there.get(key)
        if a and b and isinstance(a, dict) and isinstance(b, dict):
            if a.get("name") == b.get("name"):
                yield from differences(a, b, f"{prefix}{key}.")
            else:
                yield Difference(f"{prefix}{key}.name", a.get("name"), b.get("name"))
        elif a != b:
            yield Difference(f"{prefix}{key}", a, b)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Values of nested dictionaries by dotted key; an empty dictionary is a value."""
    if isinstance(value, dict) and value:
        return {k: v for key, item in value.items() for k, v in flat(item, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}
