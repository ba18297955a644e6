"""Keys of the schema, and below `hydra.` those of Hydra: which there are, and which values they take."""

import dataclasses
import difflib
import enum
import functools
import typing
from typing import Any

from hydra.conf import HydraConf
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.config.ranges import bare, hints
from distill.config.schema import RunConfig
from distill.config.values import shown

_structured = functools.cache(OmegaConf.structured)


def unknown_key(path: str) -> str | None:
    """A sentence about where a dotted key leaves the dataclasses of the schema, or None."""
    hint = hint_of(path)
    return hint if isinstance(hint, str) else None


def kind_of(path: str) -> Any:
    """The type of a key, `X | None` as X; `Any` for one that the schema lacks."""
    hint = hint_of(path)
    return Any if isinstance(hint, str) else bare(hint)


def wrong_value(path: str, value: Any) -> str | None:
    """A sentence about a value that a key of the schema cannot take, whatever the others are; or None."""
    why = _why_not(path, value)
    return f"{path} is {shown(value)}; {why}" if why else None


def _why_not(path: str, value: Any) -> str | None:
    kind = kind_of(path)
    part = isinstance(kind, type) and dataclasses.is_dataclass(kind)
    if value == "" and kind is not str and kind is not Any:
        return f"write {path}=VALUE"
    if kind is str and isinstance(value, bool):
        return "it is no text: write it in quotes, or null for none"
    if kind is bool and isinstance(value, int) and value not in (0, 1):
        return "allowed: true, false"
    if isinstance(value, list) and any(isinstance(each, list | dict) for each in value):
        return "each of its elements is one value"  # OmegaConf takes any
    if part and isinstance(value, str | int | float):
        return f"it has keys of its own: {', '.join(f'{path}.{each}' for each in _fields(kind))}"
    parent, _, name = path.rpartition(".")
    above = kind_of(parent) if parent else RunConfig
    try:
        if isinstance(above, type) and dataclasses.is_dataclass(above):
            OmegaConf.merge(_structured(above), {name: value})
        elif typing.get_origin(above) is not None:  # free names
            OmegaConf.merge(schema(), functools.reduce(lambda below, each: {each: below}, path.split(".")[::-1], value))
    except (OmegaConfBaseException, ValueError, TypeError, AttributeError, AssertionError) as error:
        why = str(error).splitlines()[0] if str(error) else "it cannot be read"
        if isinstance(value, bool) and isinstance(kind, type) and issubclass(kind, enum.Enum):
            why += f": YAML reads off, on, no and yes so; write '{'on' if value else 'off'}' in quotes"
        return why
    return None


def schema() -> DictConfig:
    """The schema as OmegaConf has it; `merge` copies it, and building it costs half a second."""
    return _structured(RunConfig)


def hint_of(path: str) -> Any:
    """The type of a key with its range, or a sentence about where the path leaves the schema."""
    hint: Any = RunConfig
    walked: list[str] = []
    for part in path.split("."):
        if hint is Any:
            return Any
        if typing.get_origin(hint) in (dict, typing.Dict):  # free names: corpora, arms  # noqa: UP006
            hint = typing.get_args(hint)[1]
        elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
            fields = _fields(hint)
            if part not in fields:
                near = difflib.get_close_matches(part, fields, n=3) or sorted(set(fields) - {"hydra"})
                return f"{'.'.join([*walked, part])} is no key; allowed{' there' * bool(walked)}: {', '.join(near)}"
            hint = fields[part]
        else:
            return f"{path}: {'.'.join(walked)} is a value and has no key {part!r}"
        walked.append(part)
    return hint


@functools.cache
def _fields(kind: type) -> dict[str, Any]:
    """Name and type of a dataclass' fields."""
    return hints(kind) | ({"hydra": HydraConf} if kind is RunConfig else {})
