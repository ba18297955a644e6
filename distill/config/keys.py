"""Keys of the schema, ours and below `hydra.` Hydra's: which there are, and which values they take."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import typing
from typing import Any

from hydra.conf import HydraConf
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.config.ranges import hints
from distill.config.schema import RunConfig


def unknown_key(path: str) -> str | None:
    """Walks a dotted key through the schema's dataclasses; a sentence about where it leaves them, or None."""
    found = _walk(path)
    return found if isinstance(found, str) else None


def kind_of(path: str) -> Any:
    """The type of a key of the schema, `X | None` as X; `Any` of one that is not in it."""
    found = _walk(path)
    return Any if isinstance(found, str) else found


def wrong_value(path: str, value: Any) -> str | None:
    """A sentence about a value that a key of the schema cannot take, whatever the others are; or None."""
    kind = kind_of(path)
    if kind is str and isinstance(value, bool):
        return f"{path} is {str(value).lower()}, which is no text; write it in quotes, or null for none"
    if value == "" and kind is not str and kind is not Any:
        return f"{path} is empty; write {path}=VALUE"
    if kind is bool and isinstance(value, int) and value not in (0, 1):
        return f"{path} is {value}; allowed: true, false"
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, str | int | float):
        return (
            f"{path} is {shown(value)}; it has keys of its own: {', '.join(f'{path}.{each}' for each in _fields(kind))}"
        )
    parent, _, name = path.rpartition(".")
    above = kind_of(parent) if parent else RunConfig
    try:
        if isinstance(above, type) and dataclasses.is_dataclass(above):
            OmegaConf.merge(_structured(above), {name: value})
        elif typing.get_origin(above) is not None:  # free names
            OmegaConf.merge(schema(), _nested(path, value))
    except OmegaConfBaseException as error:
        text = f"{path} is {shown(value)}; {str(error).splitlines()[0]}"
        if isinstance(value, bool) and isinstance(kind, type) and issubclass(kind, enum.Enum):
            text += f": YAML reads off, on, no and yes so; write '{'on' if value else 'off'}' in quotes"
        return text
    except (ValueError, TypeError, AttributeError, AssertionError) as error:
        return f"{path} is {shown(value)}; {str(error).splitlines()[0] if str(error) else 'it cannot be read'}"
    return None


@functools.cache
def _structured(kind: Any) -> Any:
    return OmegaConf.structured(kind)


@functools.cache
def schema() -> DictConfig:
    """The schema as OmegaConf has it; `merge` copies it, and building it costs half a second."""
    return OmegaConf.structured(RunConfig)


def shown(value: Any) -> str:
    return "null" if value is None else str(value)


def _walk(path: str) -> Any:
    """The type of a key, or a sentence about where the path leaves the schema."""
    kind: Any = RunConfig
    walked: list[str] = []
    for part in path.split("."):
        if kind is Any:
            return Any
        if typing.get_origin(kind) in (dict, typing.Dict):  # free names: corpora, arms  # noqa: UP006
            kind = typing.get_args(kind)[1]
        elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
            fields = _fields(kind)
            if part not in fields:
                near = difflib.get_close_matches(part, fields, n=3) or sorted(set(fields) - {"hydra"})
                return f"{'.'.join([*walked, part])} is no key; allowed{' there' * bool(walked)}: {', '.join(near)}"
            kind = fields[part]
        else:
            return f"{path}: {'.'.join(walked)} is a value and has no key {part!r}"
        walked.append(part)
    return kind


@functools.cache
def _fields(kind: type) -> dict[str, Any]:
    """Name and type of a dataclass' fields; `X | None`, and X with a range, count as X."""
    found = {
        name: typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
        for name, hint in hints(kind).items()
    }
    return found | ({"hydra": HydraConf} if kind is RunConfig else {})


def _nested(path: str, value: Any) -> Any:
    for part in reversed(path.split(".") if path else []):
        value = {part: value}
    return value
