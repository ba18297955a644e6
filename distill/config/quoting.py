"""Paths on the command line: what Hydra's grammar cannot read without quotes is put between them, unless it may mean
something else than a name."""

from __future__ import annotations

import re

from distill.config.paths import KEYS, home
from distill.config.spelling import MARKS, parses, quoted

HYDRA_KEYS = ("hydra.run.dir", "hydra.sweep.dir")

CONFIG_DIR = ("--config-dir", "-cd")


def spelt(arguments: list[str]) -> list[str]:
    """Arguments with their paths as Hydra takes them; `~` in its own folders, which it does not know, is replaced."""
    found: list[str] = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if found and found[-1] in CONFIG_DIR:
            argument = home(argument)
        elif flag in CONFIG_DIR and equals:
            argument = f"{flag}={home(value)}"
        elif not argument.startswith("-"):
            argument = _override(argument)
        found.append(argument)
    return found


def _override(argument: str) -> str:
    """Hydra's grammar has neither `~` nor `#` nor letters beyond ASCII outside quotes."""
    key, _, value = argument.partition("=")
    plain = key.lstrip("+")
    if "=" in value or not any(_matches(plain, each) for each in (*KEYS, *HYDRA_KEYS, "teacher.from")):
        return argument
    if plain in HYDRA_KEYS:
        bare = value[1:-1] if value[:1] == value[-1:] and value[:1] in ("'", '"') else value
        if bare.startswith("~"):
            return f"{key}={quoted(home(bare))}"
    if parses(argument):
        return argument
    several = value[:1] + value[-1:] in ("[]", "{}")
    if (MARKS - {","}) & set(value[1:-1] if several else value):
        return argument
    if several:
        return f"{key}={value[0]}{_parts(value[1:-1], named=value[0] == '{')}{value[-1]}"
    return f"{key}={_parts(value, named=False)}"


def _parts(text: str, named: bool) -> str:
    """Each part of a list, a sweep or (named) a dictionary, between quotes where it must be."""
    found = []
    for part in text.split(","):
        name, colon, value = part.partition(":") if named else ("", "", part)
        found.append(name + colon + (value if parses(f"x={value}") else quoted(value.strip())))
    return ",".join(found)


def _matches(key: str, pattern: str) -> bool:
    """The key is the pattern's, or of the list or dictionary that the pattern's last `*` stands for."""
    return any(
        re.fullmatch(re.escape(each).replace(r"\*", r"[^.]+"), key) for each in (pattern, pattern.removesuffix(".*"))
    )
