"""Each override of a command line alone: is it one, does its key exist, does the key take the value?

Where a shell or Hydra reads a value as something else, the problem gives the spelling that works.
"""

import itertools
import os
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra._internal.config_repository import IConfigRepository
from hydra.core.default_element import GroupDefault
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from distill.config import userfiles
from distill.config.arguments import TYPOGRAPHIC
from distill.config.keys import kind_of, unknown_key, wrong_value
from distill.config.registry import JOBS
from distill.config.sentences import sentence
from distill.config.spelling import right
from distill.config.values import shown

_MOST = 100
"""Values of a sweep that are checked."""


def problems_of(text: str, root: str, repository: IConfigRepository, loader: Any, swept: bool) -> Iterator[str]:
    """What is wrong with one override, and the way out.

    Args:
        root: name of the root file.
        repository: all files, those of the user included.
        loader: Hydra's, which globs search.
        swept: of a command line that runs sweeps.
    """
    try:
        override: Override = OverridesParser.create().parse_override(text)
        override.config_loader = loader
        swept_values = override.is_sweep_override()
        values = list(itertools.islice(override.sweep_iterator(), _MOST)) if swept_values else [override.value()]
    except Exception as error:  # the grammar's; or of an interval, which only other packages' sweepers draw from
        yield _unparsed(text, repository, error)
        return
    key = override.key_or_group
    group = key != "hydra" and (repository.group_exists(key) or "/" in key or override.package is not None)
    if not key:
        yield f"{text!r} has no key; write KEY{text if text.startswith('=') else '=VALUE'}"
    elif not group and (unknown := unknown_key(key)):
        yield unknown
    elif swept_values and (refused := _sweep(text, key, swept)):
        yield refused
    elif group:
        yield from _choice(text, override, values, root, repository)
    elif override.is_delete():
        parent = key.rpartition(".")[0]
        if not parent or unknown_key(f"{parent}.any name"):  # only where names are free may one be left out
            yield f"{text!r} deletes a key; every key of the schema is needed"
    else:
        for value in values:
            raw = str(value) if swept_values else text.partition("=")[2].strip()
            if problem := _wrong(key, value, raw):
                yield problem


def _choice(
    text: str, override: Override, values: list[Any], root: str, repository: IConfigRepository
) -> Iterator[str]:
    """Problems of a group's choice."""
    group = override.key_or_group
    options = repository.get_group_options(group)
    if not options:
        above, slash, _ = group.rpartition("/")
        groups = {f"{above}{slash}{each}" for each in repository.get_group_options(above, ObjectType.GROUP)} - {"hydra"}
        yield f"{group} is no group; allowed: {', '.join(sorted(groups))}"
        return
    chosen = [
        f"{each.group}@{each.package}" if each.package else each.group
        for each in repository.load_config(root).defaults_list or []  # type: ignore[union-attr]
        if isinstance(each, GroupDefault)
    ]
    if text.startswith("+") and (f"{group}@{override.package}" if override.package else group) in chosen:
        yield f"{text}: {root}.yaml chooses one already; write {text.lstrip('+')}"
        return
    for each in itertools.chain.from_iterable(value if isinstance(value, list) else [value] for value in values):
        name = Path(str(each))
        named = name.suffix != ".yaml" and not name.is_absolute() and repository.config_exists(f"{group}/{name}")
        if each is not None and not named:
            allowed = ", ".join(options)
            hint = userfiles.hint(group, str(each), userfiles.folders(repository))
            yield f"{group} is {shown(each)}; allowed: {allowed}{hint}"


def _sweep(text: str, key: str, swept: bool) -> str | None:
    """A problem of a comma outside of brackets and quotes, which is a sweep to Hydra."""
    raw, kind = text.partition("=")[2], kind_of(key)
    hydras = key.partition("/")[0].partition(".")[0] == "hydra"
    spelling = right(key, raw) if kind is str or typing.get_origin(kind) is list else None
    if typing.get_origin(kind) is list and "[" not in raw:
        return f"{key} is {raw}; it is a list: write {spelling}"
    if swept and not hydras:
        return None
    way_out = f"write {spelling}" if spelling else "give one value"
    if hydras:
        return f"{text} is a sweep over {key}, a setting of Hydra's own; {way_out}"
    return f"{text} is a sweep over {key}; add --multirun to run one after the other, or {way_out}"


def _wrong(key: str, value: Any, raw: str) -> str | None:
    """A sentence about a value that its key cannot take, or that Hydra reads as another one."""
    kind = kind_of(key)
    if isinstance(value, str) and "${" in value:
        return None  # checked when all is composed
    if key == "hydra.searchpath":
        return _searchpath(value)
    if typing.get_origin(kind) is list and not isinstance(value, list | None):
        why = "it is a list"
    elif kind is str and value is not None and not isinstance(value, str):
        if str(value) == raw and not isinstance(value, list | dict):
            return None
        why = (
            "it is read as several values, not one text"
            if isinstance(value, list | dict)
            else f"it is read as {shown(value)}"
        )
    elif isinstance(value, str) and (name := re.search(r"\$(\w+)", value)) and name[1] in os.environ:
        return (
            f"{key} is {value}; nothing replaces {name[0]} within single quotes: leave them out, or write "
            f"{value.replace(name[0], f'${{oc.env:{name[1]}}}')}"
        )
    else:
        return wrong_value(key, value)
    spelling = right(key, raw)
    return f"{key} is {raw or 'empty'}; {why}" + (f": write {spelling}" if spelling else "")


def _searchpath(value: Any) -> str | None:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        return f"hydra.searchpath is {shown(value)}; it is a list of folders: write 'hydra.searchpath=[FOLDER]'"
    for each in value:
        if not each.startswith("pkg://") and not Path(each.removeprefix("file://")).is_dir():
            return f"hydra.searchpath has {each}; no such folder"
    return None


def _unparsed(text: str, repository: IConfigRepository, error: Exception) -> str:
    """Why Hydra cannot read an override, and how to write it."""
    key, equals, raw = text.partition("=")
    if not equals and not text.startswith("~"):
        return f"{text!r} is not an override: it has no value; write {_completed(text.strip(), repository)}"
    key = "".join(TYPOGRAPHIC.get(each, each) for each in key).strip(" '\"")
    unknown = unknown_key(key.lstrip("+~"))
    if unknown and not re.search("[/@]", key):
        return f"{text!r} is not an override: {unknown}"
    spelling = right(key, raw)
    why = f"Hydra cannot read its value ({sentence(error)})"
    return f"{text!r} is not an override: {why}" + (f"; write {spelling}" if spelling else "")


def _completed(text: str, repository: IConfigRepository) -> str:
    """A likely override for a word without `KEY=`."""
    if text in JOBS.names:
        return f"job={text}"
    for group in ("experiment", "cache", "data"):
        if text in repository.get_group_options(group):
            return f"{group}={text}"
    return "KEY=VALUE, in quotes if there are spaces in it" if unknown_key(text.lstrip("+")) else f"{text}=VALUE"
