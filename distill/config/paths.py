"""Paths: which keys hold one, `~` for the home folder in each, and what is a URL.

A saved configuration has the whole path, so that it means the same to another user and in a comparison.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

KEYS = (
    "init_from",
    "teacher.init_from",
    "teacher.from_",
    "student.init_from",
    "evaluate.teacher_from",
    "export.dir",
    "cache.dir",
    "cache.dirs.*",
    "data.dir",
    "data.tokenizer.file",
    "data.corpora.*.files.*",
    "data.corpora.*.held_out_files.*",
)
"""Every key of the schema that holds a path; `*` is any name or place in a list."""

FOREIGN = "hf:"
"""Stands before a path in teacher.from."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::[A-Za-z][A-Za-z0-9+.-]*)*://")


def is_url(path: Any) -> bool:
    """It is not of this machine's own file system; `a::b` and `a:b` are plain names, and so is `out/a://b`."""
    return _URL.match(str(path)) is not None and not str(path).startswith("file://")


def home(path: str) -> str:
    """The path with `~` or `~user` at its start replaced; a URL stays as it is."""
    if path.startswith(FOREIGN):
        return FOREIGN + home(path.removeprefix(FOREIGN))
    return os.path.expanduser(path)


def expand(config: Any) -> None:
    """Replaces `~` in every path of a configuration, typed objects or plain containers, in its place."""
    for key in KEYS:
        _expand(config, key.split("."))


def _expand(node: Any, names: list[str]) -> None:
    name, *rest = names
    for at in _members(node, name):
        value = node[at] if isinstance(node, dict | list) else getattr(node, at)
        if rest:
            _expand(value, rest)
        elif isinstance(value, str):
            if isinstance(node, dict | list):
                node[at] = home(value)
            else:
                setattr(node, at, home(value))


def _members(node: Any, name: str) -> Iterator[Any]:
    if isinstance(node, list):
        yield from range(len(node)) if name == "*" else ()
    elif isinstance(node, dict):
        yield from list(node) if name == "*" else [name] if name in node else []
    elif hasattr(node, name):
        yield name
