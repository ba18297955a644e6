"""From a command line to a `RunConfig`, or to one `ConfigError` that lists everything wrong with it.

Hydra stops at the first fault, and lets `+` add keys that the schema does not have. So the command line is gone
through first, each override alone: group choices against the files of `conf/` and of the user, keys and types against
the schema. What is sound is composed, missing values and broken rules between fields join the list, and only then does
Hydra run.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.config import owner as owner  # registers ${token:}
from distill.config import paths, quoting
from distill.config.arguments import CommandLine, split
from distill.config.checks import check
from distill.config.errors import ConfigError
from distill.config.keys import schema, unknown_key, wrong_value
from distill.config.overrides import problems_of
from distill.config.registry import import_plugins
from distill.config.schema import RunConfig
from distill.config.sentences import sentence, unresolved
from distill.config.userfiles import Files

_PACKAGE = Path(__file__).resolve().parents[1]
CONF = next(folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if (folder / "config.yaml").is_file())
"""Within the package where it was built into a wheel, beside it in a clone."""

ConfigStore.instance().store(name="schema", node=RunConfig)

FREE_NAMES = "cache.dirs"
"""Hydra wants a `+` before a key that no file of `conf/` has; the corpora's names are checked all the same."""

MOST_COMBINATIONS = 20
"""Of a sweep that are composed before it starts, at a quarter of a second each. Of a larger one each value is looked
at, and what its other combinations break is refused when their turn comes."""


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


def precheck(arguments: list[str]) -> list[str]:
    """Refuses a command line that cannot run, all its faults at once, before anything heavy starts.

    Args:
        arguments: Hydra's, without the program's name.

    Returns:
        The same as Hydra takes them: flags first, one spelling.
    """
    line = split(spelt(arguments))
    problems = list(line.problems)
    if line.asks and not problems:
        return line.arguments
    own = Path(line.flags.get("--config-dir", "."))
    folders = [own.absolute()] if "--config-dir" in line.flags and own.is_dir() else []
    with _hydra(folders) as hydra:
        files = Files([*folders, *_searched(line.overrides)], CONF)
        name = _root(line, files, problems)
        sound = []
        swept = "--multirun" in line.flags or "hydra.mode=MULTIRUN" in line.overrides
        for text in line.overrides:
            found = list(problems_of(text, files, hydra.config_loader, swept, name == "config"))
            problems += found
            if not found:
                sound.append(text)
        if name is not None and not _from_files(files, problems):
            composed = _Composed(hydra, name, line, files, problems)
            composed.refused |= {text for text in line.overrides if text not in sound}
            composed.refused |= {each for p in problems for each in re.findall(r"(?<![\w.])[\w.]+=", p)}
            for combination in itertools.islice(_combinations(sound, hydra.config_loader), MOST_COMBINATIONS):
                composed.check(combination, swept)
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    return line.arguments


def resolve(overrides: list[str], config_dir: str | None = None) -> RunConfig:
    """The configuration that a command line of overrides stands for, Hydra not started; ConfigError as precheck."""
    precheck([*([f"--config-dir={config_dir}"] if config_dir else []), *overrides])
    with _hydra([Path(config_dir).absolute()] if config_dir else []) as hydra:
        return load(_compose(hydra, "config", spelt(overrides)))


def to_dict(run: RunConfig) -> dict[str, Any]:
    """The resolved configuration as plain JSON-able values."""
    box = OmegaConf.to_container(OmegaConf.structured(run), resolve=True, enum_to_str=True)
    assert isinstance(box, dict)
    return {str(k): v for k, v in box.items()}


# ---------------------------------------------------------------- a composed configuration


def _load(cfg: DictConfig) -> tuple[list[str], RunConfig | None]:
    plain = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(plain, dict)
    plain.pop("hydra", None)
    plugins = plain.get("plugins")
    problems = import_plugins(plugins) if isinstance(plugins, list) else []
    problems += _foreign_keys(plain)
    if problems:
        return problems, None
    try:
        # Merged again onto the schema: Hydra's `+` may have added keys that only this refuses.
        typed = OmegaConf.merge(schema(), plain)
        problems = unresolved(typed, missing=True)
        if problems:
            return _without_followers(problems, plain), None
        # And once more with all references replaced: one may name a text where a part or a list belongs.
        run = OmegaConf.to_object(OmegaConf.merge(schema(), OmegaConf.to_container(typed, resolve=True)))
    except OmegaConfBaseException as error:
        return [sentence(error)], None
    assert isinstance(run, RunConfig)
    paths.expand(run)
    nested = list(_nested_lists(run))
    return nested or _without_followers(list(check(run)), plain), run


def _nested_lists(part: Any, prefix: str = "") -> Iterator[str]:
    """Lists within lists: the schema has none, but OmegaConf takes them."""
    if dataclasses.is_dataclass(part):
        part = vars(part)
    if isinstance(part, dict):
        for name, value in part.items():
            yield from _nested_lists(value, f"{prefix}{name}.")
    elif isinstance(part, list):
        for each in part:
            if isinstance(each, list | dict):
                yield f"{prefix[:-1]} has {each}; each of its elements is one value"


def _without_followers(problems: list[str], plain: dict[Any, Any]) -> list[str]:
    """Without those of keys that take their value from another one that has a problem itself."""
    keys = [problem.split(" ", 1)[0] for problem in problems]
    sources = {key: _source(plain, key) for key in keys}
    follows = {key for key, source in sources.items() if source in keys and sources[source] != key}
    return [problem for key, problem in zip(keys, problems, strict=True) if key not in follows]


def _source(plain: dict[Any, Any], key: str) -> str | None:
    """The key that a key takes its value from."""
    value: Any = plain
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    found = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
    return found[1] if found else None


def _foreign_keys(plain: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    """Keys of a composed configuration that the schema lacks, at any depth."""
    for key, value in plain.items():
        unknown = unknown_key(f"{prefix}{key}")
        if unknown:
            yield unknown
        elif isinstance(value, dict):
            yield from _foreign_keys(value, f"{prefix}{key}.")


# ---------------------------------------------------------------- composing


@contextmanager
def _hydra(folders: list[Path]) -> Iterator[Hydra]:
    """Hydra as `python -m distill --config-dir FOLDER` starts it."""
    version.setbase("1.3")
    GlobalHydra.instance().clear()
    path = create_config_search_path(str(CONF))
    for folder in folders:
        path.prepend(provider="command-line", path=f"file://{folder}", anchor=SearchPathQuery(provider="schema"))
    before = HydraConfig.instance().cfg
    try:
        yield Hydra.create_main_hydra2("distill", path)
    finally:
        HydraConfig.instance().cfg = before
        GlobalHydra.instance().clear()


def _compose(hydra: Hydra, name: str, overrides: list[str], mode: RunMode = RunMode.RUN) -> DictConfig:
    return hydra.compose_config(name, overrides, run_mode=mode, with_log_configuration=False)


class _Composed:
    """What is composed of one command line, and what is wrong with that."""

    def __init__(self, hydra: Hydra, name: str, line: CommandLine, files: Files, problems: list[str]):
        self.hydra, self.name, self.line, self.files, self.problems = hydra, name, line, files, problems
        self.refused: set[str] = set()
        """Overrides that were left out."""

    def check(self, overrides: list[str], swept: bool) -> None:
        try:
            cfg = _compose(self.hydra, self.name, overrides)
        except Exception as error:  # all of it is Hydra's answer to what a user wrote
            blamed = self._blamed(overrides, error)
            self.problems += blamed.values()
            self.refused |= blamed.keys()
            rest = [text for text in overrides if text not in blamed]
            if len(rest) < len(overrides):
                self.check(rest, swept)
            return
        for group, choice in cfg.hydra.runtime.choices.items():
            if isinstance(choice, str) and not group.startswith("hydra/"):
                self.files.choose(group.partition("@")[0], choice, group.partition("@")[2] or None)
        if _from_files(self.files, self.problems):
            return
        HydraConfig.instance().set_config(cfg)
        named = {problem.split(" ", 1)[0] for problem in self.problems} | set(map(_key, self.refused))
        given = set(map(_key, self.line.overrides))
        found = [*_folder(cfg, swept or cfg.hydra.mode is RunMode.MULTIRUN), *_load(cfg)[0]]
        package = self.line.flags.get("--package", "_global_")
        if package != "_global_" and OmegaConf.select(cfg, package, default=None) is None:
            found.append(f"--package is {package}; no such key")
        for problem in found:
            key = problem.split(" ", 1)[0].rstrip(":")
            if key in named or (self.line.looks and problem.startswith(f"{key} has no value;")):
                continue
            if key in self.files.values and key not in given:
                problem += f" ({self.files.values[key][1]})"
            self.problems.append(problem)

    def _blamed(self, overrides: list[str], error: Exception) -> dict[str, str]:
        """What is wrong with overrides that cannot even be composed alone; or, where none is, with all of them."""
        parsed = {text: OverridesParser.create().parse_override(text) for text in overrides}
        groups = [t for t, o in parsed.items() if self.hydra.config_loader.get_group_options(o.key_or_group)]
        found = {}
        for text, override in parsed.items():
            try:
                _compose(self.hydra, self.name, list(dict.fromkeys([*groups, text])))
            except AssertionError as own:  # OmegaConf's only word for a key within a part that is null
                found[text] = self._within_null(groups, override) or f"{text!r}: {sentence(own)}"
            except Exception as own:
                if text not in groups or len(groups) == 1:
                    said = sentence(own)
                    found[text] = said if override.key_or_group in said else f"{text!r}: {said}"
        return found or {"": sentence(error)}

    def _within_null(self, groups: list[str], override: Override) -> str | None:
        cfg = _compose(self.hydra, self.name, groups)
        keys = override.key_or_group.split(".")
        for parent in (".".join(keys[:depth]) for depth in range(1, len(keys))):
            if OmegaConf.select(cfg, parent, default="") is None:
                return f"{override.key_or_group} is {override.value()}; {parent} is null and has no keys to set"
        return None


def _key(text: str) -> str:
    return text.lstrip("+~").partition("=")[0]


def _combinations(texts: list[str], loader: Any) -> Iterator[list[str]]:
    """Every combination of a sweep's values; one list where nothing is swept."""
    options = []
    for text in texts:
        override = OverridesParser.create().parse_override(text)
        override.config_loader = loader
        options.append([text])
        if override.is_sweep_override():
            prefix, swept = text.split("=", 1)[0], itertools.islice(override.sweep_string_iterator(), MOST_COMBINATIONS)
            options[-1] = [f"{prefix}={value}" for value in swept]
    return (list(each) for each in itertools.product(*options))


def _root(line: CommandLine, files: Files, problems: list[str]) -> str | None:
    """The name of the root file; None: there is no such file."""
    name = line.flags.get("--config-name", "config").removesuffix(".yaml")
    if name not in files.choices(""):
        problems.append(
            f"--config-name is {name}; no such file in {', '.join(map(str, [CONF, *files.folders]))}"
            f"{files.why_not('', name)}"
        )
        return None
    files.choose("", name, "_global_")
    return name


def _from_files(files: Files, problems: list[str]) -> bool:
    """Adds what is wrong with the user's files, each value alone; whether anything is."""
    found = list(files.problems)
    for key, (value, place) in files.values.items():
        problem = unknown_key(key) or wrong_value(key, value)
        if problem:
            found.append(f"{problem} ({place})")
    problems += [problem for problem in found if problem not in problems]
    return bool(found)


def _searched(overrides: list[str]) -> list[Path]:
    """Local folders of `hydra.searchpath`; what is wrong with them is told with the other overrides."""
    for text in overrides:
        if text.lstrip("+").startswith("hydra.searchpath="):
            try:
                value = OverridesParser.create().parse_override(text).value()
            except Exception:
                return []
            texts = [each for each in value if isinstance(each, str)] if isinstance(value, list) else []
            return [Path(each.removeprefix("file://")).absolute() for each in texts if not each.startswith("pkg:")]
    return []


def _folder(cfg: DictConfig, swept: bool) -> Iterator[str]:
    """What keeps the run folder from being made and written to."""
    key = "hydra.sweep.dir" if swept else "hydra.run.dir"
    part = cfg.hydra.sweep if swept else cfg.hydra.run
    wrong = unresolved(part, key.removesuffix("dir"))
    if wrong:
        yield from wrong
        return
    try:
        value = str(part.dir)
    except OmegaConfBaseException:  # a key that it names has no value, which is told
        return
    if not value.strip():
        yield f"{key} is empty; give it a folder, or leave it out for one of its own"
        return
    path = Path(os.path.abspath(value))
    there = next(each for each in (path, *path.parents) if os.path.lexists(each))
    if not there.is_dir():
        yield f"{key} is {value}; {there if there != path else 'it'} is a file, not a folder: choose another folder"
    elif not os.access(there, os.W_OK | os.X_OK):
        yield f"{key} is {value}; cannot write to {there}: choose another folder"
