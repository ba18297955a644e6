"""Records of JSON to dataclasses: what a file says is taken only where it has the type that the code relies on."""

from __future__ import annotations

import functools
import math
import typing
from collections.abc import Callable
from typing import Any


def _whole(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _real(value: Any) -> bool:
    return _whole(value) or (type(value) is float and math.isfinite(value))


_KINDS: dict[Any, Callable[[Any], bool]] = {
    int: _whole,
    float: _real,
    float | None: lambda value: value is None or _real(value),
    str: lambda value: type(value) is str and value.isprintable(),
    bool: lambda value: type(value) is bool,
    dict[str, Any]: lambda value: type(value) is dict,
}
_types = functools.cache(typing.get_type_hints)


def check_types(record: dict[str, Any], cls: type) -> None:
    """ValueError that names the first field of `cls` for which `record` has a value of another type.

    Whole numbers have to fit 64 bits, and floats to be finite. Fields of types not known here are left to the caller.
    """
    for name, kind in _types(cls).items():
        fits = _KINDS.get(kind) if name in record else None
        if fits and not fits(record[name]):
            raise ValueError(f"{name} is {record[name]!r:.80}, not {getattr(kind, '__name__', kind)}")
