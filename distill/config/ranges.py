"""What each number and text of the schema may be: ranges as metadata of its types, and one check over all of them.

A field of a plain `int` or `float` has no range; a test refuses such fields. Rules between fields are in `checks`.
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

_NAMED = 4096
"""The end of a range is named with its beginning up to here; a larger one only keeps nonsense out."""


@dataclass(frozen=True)
class Range:
    """From `least` to `most`; `above`: without `least` itself, `below`: without `most`."""

    least: float
    most: float
    above: bool = False
    below: bool = False

    def problem(self, key: str, value: float) -> str | None:
        """A sentence about a value that is not in the range."""
        if isinstance(value, float) and not math.isfinite(value):
            return f"{key} is {value}; it must be a finite number"
        low = value <= self.least if self.above else value < self.least
        high = value >= self.most if self.below else value > self.most
        if not (low or high):
            return None
        if self.most <= _NAMED or self.below:
            open_ends = f"{'(' if self.above else '['}{self.least:g}, {self.most:g}{')' if self.below else ']'}"
            return f"{key} is {value}; allowed: " + (
                open_ends if self.above or self.below else f"{self.least} to {self.most}"
            )
        if high:
            return f"{key} is {value}; at most {self.most}"
        return f"{key} is {value}; " + ("it must be positive" if self.above else f"at least {self.least}")


LARGE = 10**9
MOST_IDS = 2**24
"""Ids of a vocabulary, and tokens of a sample, that the cache's format can hold."""

Natural = Annotated[int, Range(0, LARGE)]
Count = Annotated[int, Range(1, LARGE)]
Many = Annotated[int, Range(1, 10**15)]
"""Samples or documents of a corpus."""
Size = Annotated[int, Range(1, 2**20)]
"""A dimension of a tensor."""
Layers = Annotated[int, Range(1, 10_000)]
Every = Annotated[int, Range(0, 10_000)]
"""A period in layers, or the index of one; a period of 0: none."""
Ids = Annotated[int, Range(1, MOST_IDS)]
Id = Annotated[int, Range(-1, MOST_IDS - 1)]
"""A token; -1: none, as released configurations have it."""
Draws = Annotated[int, Range(1, 1000)]
TopK = Annotated[int, Range(1, 255)]
Tau = Annotated[float, Range(0.004, 1, below=True)]
Facts = Annotated[int, Range(1, 50)]
"""Each has a name of its own, and there are so many."""
Words = Annotated[int, Range(12, 10**6)]
"""Of a document with a fact, and a question that the fact answers."""
Symbols = Annotated[int, Range(2, 94)]
"""Of a made-up language: printable characters of one byte."""
Characters = Annotated[int, Range(33, 125)]
"""Codes of these."""
Order = Annotated[int, Range(1, 3)]
Tiles = Annotated[int, Range(1, 1024)]
Stage = Annotated[int, Range(0, 1)]
Threads = Annotated[int, Range(0, 4096)]
Seed = Annotated[int, Range(0, 2**63 - 1)]
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, above=True)]
Below1 = Annotated[float, Range(0, 1, below=True)]
Between = Annotated[float, Range(0, 1, above=True, below=True)]
Exponent = Annotated[float, Range(0, 10)]
Temperature = Annotated[float, Range(0.05, 100)]
Positive = Annotated[float, Range(0, 1e12, above=True)]
NotNegative = Annotated[float, Range(0, 1e12)]
Tflops = Annotated[float, Range(0, 1e18, above=True)]
Seconds = Annotated[float, Range(0, 366 * 86400, above=True)]
"""At most a year: beyond a few of them the clocks of collectives overflow."""


class _Text:
    """Any text of printable characters that is not blank."""

    def problem(self, key: str, value: str) -> str | None:
        if not value.strip():
            return f"{key} is empty; give it a value, or null where it may have none"
        if not value.isprintable():
            return f"{key} is {value!r:.200}; it has characters that cannot be printed"
        return None


_TEXT, IS_PATH = _Text(), _Text()
PathText = Annotated[str, IS_PATH]
"""The path of a file or folder; `~` at its start is the home folder."""


def out_of_range(value: Any, hint: Any = None, key: str = "") -> Iterator[str]:
    """A sentence for each number or text of a dataclass, at any depth, that its type does not allow.

    Args:
        hint: the type of `value` with its range.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for name, kind in hints(type(value)).items():
            yield from out_of_range(getattr(value, name), kind, f"{key}.{name.rstrip('_')}".lstrip("."))
    elif isinstance(value, dict) and hint is not Any:
        for name, each in value.items():
            yield from out_of_range(each, (*typing.get_args(hint), Any, Any)[1], f"{key}.{name}")
    elif isinstance(value, list) and hint is not Any:
        for each in value:
            yield from out_of_range(each, (*typing.get_args(hint), Any)[0], key)
    elif value is not None and hint is not Any:
        allowed = typing.get_args(hint)[1] if typing.get_origin(hint) is Annotated else _TEXT if hint is str else None
        if allowed and (problem := allowed.problem(key, value)):
            yield problem


@functools.cache
def hints(kind: type) -> dict[str, Any]:
    """Name and type of a dataclass' fields, ranges included; `X | None` counts as X."""
    every = typing.get_type_hints(kind, include_extras=True)
    return {field.name: _some(every[field.name]) for field in dataclasses.fields(kind)}


def bare(hint: Any) -> Any:
    """A type without its range."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _some(hint: Any) -> Any:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return next(each for each in typing.get_args(hint) if each is not types.NoneType)
    return hint
