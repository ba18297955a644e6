"""Each override of a command line alone: is it one, does its key exist, does the key take the value?

Where shell or Hydra read something else than was meant, the problem says the spelling that works.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from distill.config.arguments import TYPOGRAPHIC
from distill.config.keys import kind_of, shown, unknown_key, wrong_value
from distill.config.registry import JOBS
from distill.config.sentences import sentence
from distill.config.spelling import as_list, parses, right, typographic
from distill.config.userfiles import Files

_MOST = 100
"""Values of a sweep that are looked at."""


def problems_of(text: str, files: Files, loader: Any, swept: bool, ours: bool) -> Iterator[str]:
    """What is wrong with one override, and the way out.

    Args:
        loader: Hydra's, for its own groups.
        swept: of a command line that runs sweeps.
        ours: the root file is the project's, whose groups are known.
    """
    try:
        override: Override = OverridesParser.create().parse_override(text)
    except Exception as error:
        yield _unparsed(text, files, error)
        return
    override.config_loader = loader  # which globs look through
    if override.is_sweep_override():
        try:
            list(itertools.islice(override.sweep_iterator(), 1))
        except Exception as error:  # an interval, which only the sweepers of other packages can draw from
            yield f"{text}: {sentence(error)}"
            return
    key, package = override.key_or_group, override.package
    if not key:
        yield f"{text!r} has no key; write KEY{text if text.startswith('=') else '=VALUE'}"
        return
    if files.is_group(key) or key.startswith("hydra/"):
        yield from _choice(text, override, files, loader, swept, ours)
        return
    if package is not None or "/" in key:
        groups = sorted({path.name for path in files.ours.iterdir() if path.is_dir()})
        yield f"{key} is no group; allowed: {', '.join(groups)}"
        return
    unknown = unknown_key(key)
    if unknown:
        yield unknown
        return
    if override.is_delete():
        parent = key.rpartition(".")[0]
        if not parent or unknown_key(f"{parent}.any name"):  # only where names are free may one be left out
            yield f"{text!r} deletes a key; every key of the schema is needed"
        return
    raw = text.partition("=")[2].strip()
    if override.is_sweep_override() and (refused := _sweep(text, key, raw, override, swept)):
        yield refused
        return
    for value in _values(override):
        problem = _wrong(key, value, raw if not override.is_sweep_override() else str(value))
        if problem:
            yield problem


def _choice(text: str, override: Override, files: Files, loader: Any, swept: bool, ours: bool) -> Iterator[str]:
    """Of a group's files."""
    group, package = override.key_or_group, override.package
    hydras = group.startswith("hydra/")
    if override.is_sweep_override() and hydras:
        yield f"{text} would sweep over Hydra's own settings; choose one"
        return
    if override.is_sweep_override() and not swept:
        yield f"{text} is a sweep; add --multirun to run one after the other, or choose one"
        return
    choices = loader.get_group_options(group) if hydras else files.choices(group)
    if hydras and not choices:
        groups = ", ".join(f"hydra/{each}" for each in loader.get_group_options("hydra", ObjectType.GROUP))
        yield f"{group} is no group; allowed: {groups}"
        return
    if hydras:
        choices = sorted(set(choices))
    elif ours and not (override.is_add() or override.is_force_add() or override.is_delete()):
        known = [each for each in files.chosen if each.partition("@")[0] == group]
        if known and (f"{group}@{package}" if package else group) not in known:
            value = text.partition("=")[2]
            yield f"{text} names no place for {group}; write " + " or ".join(f"{each}={value}" for each in known)
            return
    if (
        ours
        and (override.is_add() or override.is_force_add())
        and (f"{group}@{package}" if package else group) in files.chosen
    ):
        yield f"{text}: config.yaml chooses one already; write {text.lstrip('+')}"
        return
    for value in _values(override):
        for each in value if isinstance(value, list) else [value]:
            if each is not None and str(each) not in choices:
                hint = files.why_not(group, str(each)) if not hydras else ""
                yield f"{group} is {each or 'empty'}; allowed: {', '.join(choices)}{hint}"
            elif each is not None and not hydras:
                files.choose(group, str(each), package)


def _sweep(text: str, key: str, raw: str, override: Override, swept: bool) -> str | None:
    """A comma outside of brackets and quotes is a sweep; is one meant?"""
    if key.split(".", 1)[0] == "hydra":
        spelling = right(key, raw, kind_of(key))
        return f"{text} would sweep over Hydra's own settings; " + (f"write {spelling}" if spelling else "give one")
    kind = kind_of(key)
    if typing.get_origin(kind) is list and "[" not in raw:
        return f"{key} is {raw}; it is a list: write {right(key, raw, kind)}"
    if swept:
        return None
    spelling = right(key, raw, str) if kind is str else None
    return (
        f"{text} is a sweep over {key}; add --multirun to run one after the other"
        + (f", or write {spelling} for this text" if spelling else ", or give one value")
    )  # fmt: skip


def _values(override: Override) -> list[Any]:
    if not override.is_sweep_override():
        return [override.value()]
    return list(itertools.islice(override.sweep_iterator(), _MOST))


def _wrong(key: str, value: Any, raw: str) -> str | None:
    """A sentence about a value that its key cannot take, or takes for something else than was written."""
    kind = kind_of(key)
    if key == "hydra.searchpath":
        return _searchpath(value)
    if isinstance(value, str) and "${" in value:
        return None  # checked when all is composed
    if typing.get_origin(kind) is list and isinstance(value, str | int | float) and not isinstance(value, bool):
        if value == "":
            return f"{key} is empty; for no elements write {shlex.quote(f'{key}=[]')}"
        return f"{key} is {raw}; it is a list: write {as_list(key, raw, kind)}"
    if kind is str and value is not None and not isinstance(value, str):
        spelling = right(key, raw, str)
        way_out = f"; for this text write {spelling}" if spelling else ""
        if isinstance(value, list | dict):
            return f"{key} is {raw}; it takes one text, not {'a list' if isinstance(value, list) else 'keys'}{way_out}"
        if str(value) != raw:
            return f"{key} is {raw}, which reads as {shown(value)}{way_out}"
        return None
    if isinstance(value, str) and (found := re.search(r"\$(\w+)", value)) and found[1] in os.environ:
        return (
            f"{key} is {value}; nothing replaces {found[0]} within single quotes: leave them out, or write "
            f"{value.replace(found[0], f'${{oc.env:{found[1]}}}')}"
        )
    problem = wrong_value(key, value)
    if problem and typing.get_origin(kind) is list and isinstance(value, str):
        return f"{problem}; write {as_list(key, value, kind)}"
    return problem


def _searchpath(value: Any) -> str | None:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        return f"hydra.searchpath is {shown(value)}; it is a list of folders: write 'hydra.searchpath=[FOLDER]'"
    for each in value:
        if not each.startswith("pkg://") and not Path(each.removeprefix("file://")).is_dir():
            return f"hydra.searchpath has {each}; no such folder"
    return None


def _unparsed(text: str, files: Files, error: Exception) -> str:
    """Why Hydra cannot read it, in our words, and how to write it."""
    key, equals, raw = text.partition("=")
    if not equals and not text.startswith("~"):
        return f"{text!r} is not an override: it has no value; write {_completed(text.strip(), files)}"
    if not key.strip("+~ "):
        return f"{text!r} is not an override: it has no key; write KEY={raw}"
    what = f"{text!r} is not an override"
    name = typographic(key).strip().strip("'\"")
    if name != key:
        plain = f"{name}={typographic(raw).strip().strip(chr(34) + chr(39))}"
        why = "its key has spaces, quotes or dashes that belong to none"
        return f"{what}: {why}; write {shlex.quote(plain)}" if parses(plain) else f"{what}: {why}"
    unknown = unknown_key(key.lstrip("+~"))
    if unknown and not re.search("[/@]", key):
        return f"{text!r} is not an override: {unknown}"
    raw = raw.strip()
    kind = kind_of(key.lstrip("+~"))
    spelling = None
    if any(each in raw for each in TYPOGRAPHIC):
        why = "it has quotes, dashes or spaces as documents have them"
        plain = f"{key}={typographic(raw)}"
        spelling = shlex.quote(plain) if parses(plain) else right(key, typographic(raw), kind)
    elif "${" in raw and raw.count("{") > raw.count("}"):
        why = "its ${ is not closed; write ${KEY}"
    else:
        marks = {each for each in raw if not re.match(r"[\w\s/.:*@?|+$%\\-]", each)}
        marks -= set("[],") if typing.get_origin(kind) is list else set()
        listed = f" {' '.join(sorted(marks))} " if marks else " "
        why = f"Hydra reads{listed}in a value as marks of its own" if marks else sentence(error)
        spelling = right(key, raw, kind)
        if spelling is not None and not _takes(spelling):
            spelling = None
    return f"{what}: {why}" + (f"; write {spelling}" if spelling else "")


def _completed(text: str, files: Files) -> str:
    """What someone may have meant who left out `KEY=`."""
    if text in JOBS.names:
        return f"job={text}"
    for group in ("experiment", "cache", "data"):
        if text in files.choices(group):
            return f"{group}={text}"
    return (
        f"{text}=VALUE" if unknown_key(text.lstrip("+")) is None else "KEY=VALUE, in quotes if there are spaces in it"
    )


def _takes(spelling: str) -> bool:
    """The key takes the value of an argument that is spelt for a shell."""
    override = OverridesParser.create().parse_override(shlex.split(spelling)[0])
    return (
        unknown_key(override.key_or_group) is not None or wrong_value(override.key_or_group, override.value()) is None
    )
