"""JSON records to dataclasses, checked: a value is taken only where it has the type that the code relies on."""

import functools
import math
import typing
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def _is_int(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _is_float(value: Any) -> bool:
    return _is_int(value) or (type(value) is float and math.isfinite(value))


_KINDS: dict[Any, Callable[[Any], bool]] = {
    int: _is_int,
    float: _is_float,
    float | None: lambda value: value is None or _is_float(value),
    str: lambda value: type(value) is str and value.isprintable(),
    bool: lambda value: type(value) is bool,
    dict[str, Any]: lambda value: type(value) is dict,
}
_types: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)


def checked(cls: type[T], record: dict[str, Any]) -> T:
    """The dataclass of a record.

    Whole numbers have to fit 64 bits, floats to be finite, texts to be printable. Fields of types not listed above are
    left to the caller.

    Raises:
        ValueError: names the first field whose value has another type.
        TypeError: a field that is missing, or that the dataclass does not have.
    """
    for name, kind in _types(cls).items():
        fits = _KINDS.get(kind) if name in record else None
        if fits and not fits(record[name]):
            raise ValueError(f"{name} is {record[name]!r:.80}, not {getattr(kind, '__name__', kind)}")
    return cls(**record)
