"""How to write a value for a shell and for Hydra's grammar."""

import re
import shlex
import typing
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from distill.config.arguments import TYPOGRAPHIC
from distill.config.keys import hint_of, kind_of, wrong_value
from distill.config.paths import has_paths, home
from distill.config.ranges import bare

HYDRA_KEYS = ("hydra.run.dir", "hydra.sweep.dir")
FREE_NAMES = ("cache.dirs.", "cache.codec.options.", "student.weighting.plugins.")
"""Mappings that no file of `conf/` has: Hydra adds a key to them only with a `+` before it."""
_MARKS = set("[]{}()'\",")
"""A text with one of these has to be quoted by the user: it may be a list, a choice or a call of a function."""


def spelt(arguments: list[str]) -> list[str]:
    """Arguments as Hydra takes them: `teacher.from` is no name of a Python field, and a key that no file of `conf/`
    has needs a `+`; a path may have what Hydra's grammar cannot read without quotes."""
    return [each if each.startswith("-") else _spelt(each) for each in arguments]


def _spelt(argument: str) -> str:
    key, equals, value = argument.partition("=")
    plain = key.lstrip("+")
    key, plain = ("teacher.from_",) * 2 if key == "teacher.from" else (key, plain)
    if f"{key}.".startswith(FREE_NAMES):
        key = f"++{key}"
    if equals and "=" not in value and (plain in HYDRA_KEYS or has_paths(hint_of(plain))):
        value = _path(plain, value)
    return f"{key}{equals}{value}"


def _path(key: str, value: str) -> str:
    """A path, or several, in the quotes that they need, `~` of Hydra's folders replaced; with a mark, as it is."""
    if key in HYDRA_KEYS and _unquoted(value).startswith("~"):
        return quoted(home(_unquoted(value)))
    several = value[:1] + value[-1:] in ("[]", "{}")
    inner = value[1:-1] if several else value
    if parsed(value) is not None or (_MARKS - {","}) & set(inner):
        return value
    parts = []
    for part in inner.split(","):
        name, colon, path = part.partition(":") if value[:1] == "{" else ("", "", part)
        parts.append(name + colon + (path if parsed(path) is not None else quoted(path.strip())))
    return f"{value[0]}{','.join(parts)}{value[-1]}" if several else ",".join(parts)


def right(key: str, raw: str) -> str | None:
    """The argument, for a shell, that sets a key to the text or the list of texts `raw`; None: there is none."""
    kind = kind_of(key.lstrip("+~"))
    raw = "".join(TYPOGRAPHIC.get(each, each) for each in raw).strip()
    if typing.get_origin(kind) is list:
        parts = [_unquoted(part) for part in raw.strip("[]").split(",") if part.strip()]
        value = f"[{','.join(_written(part, bare(typing.get_args(kind)[0])) for part in parts)}]"
    else:
        value = _written(_unquoted(raw), kind)
    taken = parsed(value)
    if taken is None or taken.is_sweep_override() or wrong_value(key.lstrip("+~"), taken.value()):
        return None
    return shlex.quote(f"{key}={value}")


def parsed(value: str) -> Override | None:
    """What Hydra's grammar makes of a value; None: it cannot read it."""
    try:
        return OverridesParser.create().parse_override(f"key={value}")
    except Exception:  # the grammar's own errors, and those of what it makes of a text
        return None


def _written(text: str, kind: Any) -> str:
    """A text as Hydra takes it for a value of this kind."""
    taken = parsed(text)
    if taken is None or taken.is_sweep_override() or (kind is str and taken.value() != text):
        return quoted(text)
    return text


def _unquoted(text: str) -> str:
    """Without quotes around it, whole ones or what is left of them."""
    return text.strip().strip("'\"")


def quoted(text: str) -> str:
    """In Hydra's quotes; a run of backslashes counts double only before a quote."""
    mark = '"' if '"' not in text else "'"
    inner = re.sub(rf"(\\*)({mark}|\Z)", lambda run: run[1] * 2 + (run[2] and f"\\{mark}"), text)
    return f"{mark}{inner}{mark}"
