"""Paths: `~` for the home folder in each, and what is a URL.

Keys that hold a path have the type `PathText`. A saved configuration has the whole path, which is the same to another
user and in a comparison.
"""

import dataclasses
import os
import re
import typing
from typing import Any

from distill.config.ranges import IS_PATH, hints

FOREIGN = "hf:"
"""Before a path in teacher.from."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::[A-Za-z][A-Za-z0-9+.-]*)*://")


def is_url(path: Any) -> bool:
    """It is not of this machine's own file system; `a::b` and `a:b` are plain names, and so is `out/a://b`."""
    return _URL.match(str(path)) is not None and not str(path).startswith("file://")


def home(path: str) -> str:
    """The path with `~` or `~user` at its start replaced; a URL stays as it is."""
    if path.startswith(FOREIGN):
        return FOREIGN + home(path.removeprefix(FOREIGN))
    return os.path.expanduser(path)


def has_paths(hint: Any) -> bool:
    """A type of the schema is a path, a list of paths, or names with a path each."""
    return any(each is IS_PATH or has_paths(each) for each in typing.get_args(hint))


def expanded(value: Any, hint: Any) -> Any:
    """The value of a key, typed objects or plain containers, with `~` replaced in each of its paths.

    hint: the key's type.
    """
    if isinstance(value, str):
        return home(value) if has_paths(hint) else value
    below = typing.get_args(hint)[-1] if typing.get_args(hint) else None
    if isinstance(value, list):
        return [expanded(each, below) for each in value]
    if isinstance(value, dict):
        kinds = (
            hints(hint) if isinstance(hint, type) and dataclasses.is_dataclass(hint) else dict.fromkeys(value, below)
        )
        return {name: expanded(each, kinds.get(name)) for name, each in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kinds = hints(type(value))
        return dataclasses.replace(value, **{name: expanded(getattr(value, name), kinds[name]) for name in kinds})
    return value
