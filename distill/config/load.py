"""From a command line to a `RunConfig`, or to one `ConfigError` that lists everything wrong with it.

Hydra stops at the first fault, and lets `+` add keys that the schema does not have. So the command line is gone
through first, each override alone: group choices against the files of `conf/`, keys and types against the schema. What
is sound is composed, missing values and broken rules between fields join the list, and only then does Hydra run.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins  # noqa: F401  (registers the config sources)
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.config import paths, quoting
from distill.config.checks import check
from distill.config.errors import ConfigError
from distill.config.schema import RunConfig

_PACKAGE = Path(__file__).resolve().parents[1]
CONF = next(folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if (folder / "config.yaml").is_file())
"""Within the package where it was built into a wheel, beside it in a clone."""

ConfigStore.instance().store(name="schema", node=RunConfig)

FREE_NAMES = "cache.dirs"
"""Hydra wants a `+` before a key that no file of `conf/` has; the corpora's names are checked all the same."""


def spelt(arguments: list[str]) -> list[str]:
    """A command line as Hydra takes it: `teacher.from` is no name that a Python field may have."""
    found = []
    for argument in quoting.spelt(arguments):
        if argument.startswith("teacher.from="):
            argument = argument.replace("teacher.from=", "teacher.from_=", 1)
        elif argument.startswith((f"{FREE_NAMES}.", f"{FREE_NAMES}=")):
            argument = f"++{argument}"
        found.append(argument)
    return found


def load(cfg: DictConfig) -> RunConfig:
    """A composed configuration as typed objects; raises ConfigError with every problem found."""
    problems, run = _load(cfg)
    if problems or run is None:
        raise ConfigError(*problems)
    return run


def precheck(arguments: list[str]) -> None:
    """Refuses a command line that cannot run, all its faults at once, before anything heavy starts.

    Args:
        arguments: Hydra's, without the program's name; flags (`--multirun`, `--cfg job`) are left to Hydra.
    """
    problems: list[str] = []
    overrides, own = _split(spelt(arguments))
    texts = [a for a in overrides if not a.lower().startswith(("hydra.", "+hydra.", "++hydra."))]
    sound: list[str] = []
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for text in texts:
            found = list(_override_problems(text, [CONF, *own]))
            problems += found
            if not found:
                sound.append(text)
        if own:
            sound.append(_searchpath(own))
        for combination in _sweeps(sound):
            try:
                composed = compose("config", overrides=combination)
            except (HydraException, OmegaConfBaseException) as error:
                problems.append(_sentence(error))
                continue
            except AssertionError:  # OmegaConf's only word for a key within a part that is null
                below = list(_within_null(combination))
                if not below:
                    raise
                problems += below
                continue
            named = tuple(p.split(" ", 1)[0] + " " for p in problems)
            problems += [p for p in _load(composed)[0] if not p.startswith(named)]
    GlobalHydra.instance().clear()
    if problems:
        raise ConfigError(*dict.fromkeys(problems))


def resolve(overrides: list[str], config_dir: str | None = None) -> RunConfig:
    """The configuration that a command line of overrides stands for, Hydra not started; ConfigError as precheck."""
    overrides = spelt(overrides)
    precheck([*([f"--config-dir={config_dir}"] if config_dir else []), *overrides])
    own = [_searchpath([Path(config_dir).absolute()])] if config_dir else []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return load(compose("config", overrides=[*own, *overrides]))


def to_dict(run: RunConfig) -> dict[str, Any]:
    """The resolved configuration as plain JSON-able values."""
    box = OmegaConf.to_container(OmegaConf.structured(run), resolve=True, enum_to_str=True)
    assert isinstance(box, dict)
    return {str(k): v for k, v in box.items()}


def _load(cfg: DictConfig) -> tuple[list[str], RunConfig | None]:
    plain = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(plain, dict)
    plain.pop("hydra", None)
    problems = list(_foreign_keys(plain))
    if problems:
        return problems, None
    try:
        # Merged again onto the schema: Hydra's `+` may have added keys that only this refuses.
        typed = OmegaConf.merge(_schema(), plain)
        missing = sorted(OmegaConf.missing_keys(typed))
        if missing:
            return [f"{key} has no value; set {key}=..." for key in missing], None
        run = OmegaConf.to_object(typed)
    except OmegaConfBaseException as error:
        return [_sentence(error)], None
    assert isinstance(run, RunConfig)
    paths.expand(run)
    return list(check(run)), run


def _split(arguments: list[str]) -> tuple[list[str], list[Path]]:
    """The overrides among Hydra's arguments, and the user's own configuration folders (`--config-dir`)."""
    with_value = ("--cfg", "-c", "--package", "-p", "--config-name", "-cn", "--config-dir", "-cd", "--info", "-i")
    overrides: list[str] = []
    own: list[Path] = []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        flag, _, value = argument.partition("=")
        if flag in with_value and not value:
            value = next(rest, "")
        if flag in ("--config-dir", "-cd"):
            own.append(Path(value).absolute())
    return overrides, own


def _searchpath(folders: list[Path]) -> str:
    """The override that adds folders, in quotes: a name may have spaces and commas."""
    quoted = ["'file://" + str(folder).replace("'", "\\'") + "'" for folder in folders]
    return f"hydra.searchpath=[{','.join(quoted)}]"


def _override_problems(text: str, folders: list[Path]) -> Iterator[str]:
    try:
        override: Override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        yield f"{text!r} is not an override: {_sentence(error)}"
        return
    group = override.key_or_group
    choices = {file.stem for folder in folders for file in (folder / group).glob("*.yaml")}
    if choices or (CONF / group).is_dir():
        for value in _values(override):
            if value is not None and str(value) not in choices:
                yield f"{group} is {value}; allowed: {', '.join(sorted(choices))}"
        return
    path = group if override.package is None else f"{group}@{override.package}"
    unknown = _unknown_key(path)
    if unknown:
        yield unknown
        return
    if override.is_delete():
        parent = path.rpartition(".")[0]
        if not parent or _unknown_key(f"{parent}.any name"):  # only where names are free may one be left out
            yield f"{text!r} deletes a key; every key of the schema is needed"
        return
    for value in _values(override):
        try:
            OmegaConf.merge(_schema(), _nested(path, value))
        except OmegaConfBaseException as error:
            yield f"{path} is {_shown(value)}; {str(error).splitlines()[0]}"


def _within_null(overrides: list[str]) -> Iterator[str]:
    """Overrides that set a key of a part of the configuration that its groups leave null."""
    parsed = {text: OverridesParser.create().parse_override(text) for text in overrides}
    groups = [t for t, o in parsed.items() if (CONF / o.key_or_group).is_dir() or o.key_or_group.startswith("hydra.")]
    composed = compose("config", overrides=groups)
    for override in parsed.values():
        keys = override.key_or_group.split(".")
        for parent in (".".join(keys[:depth]) for depth in range(1, len(keys))):
            if OmegaConf.select(composed, parent, default="") is None:
                yield f"{override.key_or_group} is {override.value()}; {parent} is null and has no keys to set"


@functools.cache
def _schema() -> DictConfig:
    """The schema as OmegaConf has it; `merge` copies it, and building it costs half a second."""
    return OmegaConf.structured(RunConfig)


def _nested(path: str, value: Any) -> dict[str, Any]:
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


def _values(override: Override) -> list[Any]:
    if override.is_sweep_override():
        return list(override.sweep_iterator())
    return [override.value()]


def _sweeps(texts: list[str]) -> list[list[str]]:
    """Every combination of a sweep's values; one list where nothing is swept."""
    combinations: list[list[str]] = [[]]
    for text in texts:
        override = OverridesParser.create().parse_override(text)
        options = [text]
        if override.is_sweep_override():
            prefix = text.split("=", 1)[0]
            options = [f"{prefix}={value}" for value in override.sweep_string_iterator()]
        combinations = [[*c, option] for c in combinations for option in options]
    return combinations


def _unknown_key(path: str) -> str | None:
    """Walks a dotted key through the schema's dataclasses; a sentence about where it leaves them, or None."""
    kind: Any = RunConfig
    walked: list[str] = []
    for part in path.split("."):
        if typing.get_origin(kind) is dict:  # free names: corpora, arms
            kind = typing.get_args(kind)[1]
        elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
            fields = _fields(kind)
            if part not in fields:
                near = difflib.get_close_matches(part, fields, n=3) or sorted(fields)
                return f"{'.'.join([*walked, part])} is no key; allowed{' there' * bool(walked)}: {', '.join(near)}"
            kind = fields[part]
        else:
            return f"{path}: {'.'.join(walked)} is a value and has no key {part!r}"
        walked.append(part)
    return None


@functools.cache
def _fields(kind: type) -> dict[str, Any]:
    """Name and type of a dataclass' fields; `X | None` counts as X."""
    return {
        name: next((t for t in typing.get_args(hint) if t is not type(None)), hint)
        if isinstance(hint, types.UnionType)
        else hint
        for name, hint in typing.get_type_hints(kind).items()
    }


def _foreign_keys(plain: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    """Keys of a composed configuration that the schema lacks, at any depth."""
    for key, value in plain.items():
        unknown = _unknown_key(f"{prefix}{key}")
        if unknown:
            yield unknown
        elif isinstance(value, dict):
            yield from _foreign_keys(value, f"{prefix}{key}.")


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def _sentence(error: Exception) -> str:
    """The first line of a library's message: the rest of it speaks of the library's own types."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = getattr(error, "full_key", None)
    text = lines[0] if lines else type(error).__name__
    if error.__cause__ is not None:
        text += f" ({str(error.__cause__).splitlines()[0]})"
    return f"{key}: {text}" if key and key not in text else text
