"""How to write a value so that shell and Hydra take it for what was meant."""

from __future__ import annotations

import shlex
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from distill.config.arguments import TYPOGRAPHIC

MARKS = set("[]{}()'\",")
"""What a name has to be quoted for by its user: it may mean something else."""


def right(key: str, raw: str, kind: Any) -> str | None:
    """The argument, for a shell, that sets `key` to the text `raw`, or to a list of such texts; None: there is none.

    Args:
        kind: the key's type; of `list` the parts of `raw` become elements.
    """
    raw = raw.strip()
    if getattr(kind, "__origin__", kind) is list:
        meant: Any = [_bare(part) for part in raw.strip("[]").split(",") if part.strip()]
        value = f"[{','.join(map(_element, meant))}]"
    elif kind is not str and _one_value(f"{key}={_bare(raw)}"):
        return shlex.quote(f"{key}={_bare(raw)}")
    else:
        meant = _bare(raw)
        value = quoted(meant)
    found = f"{key}={value}"
    try:
        taken = OverridesParser.create().parse_override(found)
    except HydraException:
        return None
    return shlex.quote(found) if not taken.is_sweep_override() and taken.value() == meant else None


def as_list(key: str, value: str, kind: Any) -> str:
    """The argument, for a shell, that sets `key`, a list, to this one element."""
    return shlex.quote(f"{key}=[{_element(value) if kind.__args__[0] is str else value}]")


def parses(text: str) -> bool:
    """Hydra's grammar reads it as an override, whatever its key."""
    try:
        OverridesParser.create().parse_override(text)
    except Exception:  # the grammar's own errors, and those of what it makes of a text
        return False
    return True


def _one_value(text: str) -> bool:
    return parses(text) and not OverridesParser.create().parse_override(text).is_sweep_override()


def typographic(text: str) -> str:
    """The text with the plain quotes, dashes and spaces that documents make others of."""
    return "".join(TYPOGRAPHIC.get(each, each) for each in text)


def _element(text: str) -> str:
    try:
        plain = OverridesParser.create().parse_override(f"key=[{text}]").value() == [text]
    except HydraException:
        plain = False
    return text if plain else quoted(text)


def _bare(text: str) -> str:
    """Without quotes around it, whole ones or what is left of them."""
    text = text.strip()
    if text[:1] in ("'", '"') and (len(text) == 1 or text.count(text[0]) == 1 or text[-1] == text[0]):
        return text[1:].removesuffix(text[0])
    if text[-1:] in ("'", '"') and text.count(text[-1]) == 1:
        return text[:-1]
    return text


def quoted(text: str) -> str:
    """In Hydra's quotes; a run of backslashes counts double only before a quote."""
    mark = '"' if '"' not in text else "'"
    out, slashes = "", 0
    for each in [*text, ""]:
        if each == "\\":
            slashes += 1
            continue
        out += "\\" * (2 * slashes if each in (mark, "") else slashes)
        out += f"\\{each}" if each == mark else each
        slashes = 0
    return f"{mark}{out}{mark}"
