"""From a command line to a `RunConfig`, or to one `ConfigError` that lists everything wrong with it.

Hydra stops at the first fault, and lets `+` add keys that the schema does not have. So each override is checked alone
first: group choices against the files of `conf/` and of the user, keys and types against the schema. What is sound is
composed, missing values and broken rules between fields join the list, and only then does Hydra run.
"""

import contextlib
import itertools
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from hydra import version
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.config import owner as owner  # registers ${token:}
from distill.config import paths, userfiles
from distill.config.arguments import HELPS, PRINTS, CommandLine, split
from distill.config.checks import check
from distill.config.errors import ConfigError
from distill.config.keys import schema, unknown_key
from distill.config.overrides import problems_of
from distill.config.registry import import_plugins
from distill.config.schema import RunConfig
from distill.config.sentences import key_of, sentence, unresolved
from distill.config.spelling import spelt
from distill.config.userfiles import CONF

T = TypeVar("T")

ConfigStore.instance().store(name="schema", node=RunConfig)

MOST_COMBINATIONS = 20
"""Of a sweep that are composed before it starts, at a tenth of a second each. Of a larger one each value is checked
alone, and what its other combinations break is refused when their turn comes."""


def load(cfg: DictConfig) -> RunConfig:
    """A composed configuration as typed objects; ConfigError with every problem."""
    broken = [problem for file in userfiles.read.values() for problem in file.problems]
    userfiles.read.clear()  # what is composed next in this process may leave them out
    problems, run = (broken, None) if broken else _load(cfg)
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
    if line.flags.keys() & HELPS and not line.problems:
        return line.arguments
    with _hydra(line.flags.get("--config-dir")) as hydra:
        problems = _problems(line, hydra)
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    return line.arguments


def resolve(overrides: list[str], config_dir: str | None = None) -> RunConfig:
    """The configuration of a command line of overrides, without starting Hydra; ConfigError as precheck."""
    precheck([*([f"--config-dir={config_dir}"] if config_dir else []), *overrides])
    with _hydra(config_dir) as hydra:
        return load(_compose(hydra, "config", spelt(overrides)))


def to_dict(part: Any) -> dict[str, Any]:
    """A resolved configuration, or a part of one, as plain JSON-able values."""
    box = OmegaConf.to_container(OmegaConf.structured(part), resolve=True, enum_to_str=True)
    assert isinstance(box, dict)
    return {str(k): v for k, v in box.items()}


def to_yaml(part: Any) -> str:
    """The same as text."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(part)))


def typed(kind: type[T], values: Any) -> T:
    """The typed object of values that `to_dict` gave, perhaps of an older version, which had fewer keys; ValueError:
    they are not of that kind."""
    try:
        return cast(T, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values)))
    except OmegaConfBaseException as error:
        raise ValueError(str(error)) from error


def read_yaml(path: Path) -> Any:
    """The values in a file; ValueError: it is not YAML."""
    try:
        return OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(str(error)) from error


# ---------------------------------------------------------------- a command line


def _problems(line: CommandLine, hydra: Hydra) -> list[str]:
    loader, problems = hydra.config_loader, list(line.problems)
    name = line.flags.get("--config-name", "config").removesuffix(".yaml")
    repository = _repository(loader, name, line.overrides)
    where = userfiles.folders(repository)
    refused = []
    for text in line.overrides:
        wrong = list(problems_of(text, name, repository, loader, line.sweeps))
        problems += wrong
        refused += [text] if wrong else []
    if not repository.config_exists(name):
        known = ", ".join(map(str, [CONF, *where]))
        return [*problems, f"--config-name is {name}; no such file in {known}{userfiles.hint('', name, where)}"]
    # A key that a problem names as `KEY=` is not missing besides.
    named = {*map(_key, refused), *(key for each in problems for key in re.findall(r"(?<![\w.])([\w.]+)=", each))}
    if "plugins" in map(_key, refused):  # names of parts that a module would have added are not wrong besides
        return problems
    for overrides in itertools.islice(_combinations(line.overrides, refused, loader), MOST_COMBINATIONS):
        for problem in _composed_problems(hydra, name, overrides, where, line):
            key = key_of(problem)
            incomplete = problem.startswith(f"{key} has no value;")
            if key not in named and not (incomplete and line.flags.keys() & PRINTS):
                problems.append(problem)
    return problems


def _repository(loader: Any, name: str, overrides: list[str]) -> IConfigRepository:
    """All files that Hydra searches, with those of `hydra.searchpath`."""
    more = [text for text in overrides if text.lstrip("+").startswith("hydra.searchpath=")]
    with contextlib.suppress(Exception), warnings.catch_warnings():  # a wrong one is a problem of that override
        warnings.simplefilter("ignore")
        return loader._parse_overrides_and_create_caching_repo(name, more)[1]
    return loader.repository


def _combinations(texts: list[str], refused: list[str], loader: Any) -> Iterator[list[str]]:
    """Every combination of the values of sound overrides; one list where nothing is swept."""
    options = []
    for text in texts:
        if text in refused:
            continue
        override = OverridesParser.create().parse_override(text)
        override.config_loader = loader
        options.append([text])
        if override.is_sweep_override():
            prefix, swept = text.split("=", 1)[0], itertools.islice(override.sweep_string_iterator(), MOST_COMBINATIONS)
            options[-1] = [f"{prefix}={value}" for value in swept]
    return (list(each) for each in itertools.product(*options))


def _composed_problems(
    hydra: Hydra, name: str, overrides: list[str], where: list[Path], line: CommandLine
) -> Iterator[str]:
    """Problems of one configuration: of the user's files, or else of what is composed of them and the overrides."""
    places: dict[str, str] = {}
    if where:
        of_files: list[str] = []
        try:
            entries = hydra.config_loader.compute_defaults_list(name, overrides, RunMode.RUN).defaults
            places = userfiles.check(entries, where, of_files)
        except Exception as error:
            of_files = [userfiles.defaults_problem(error)]
        if of_files:
            yield from of_files
            return
    try:
        cfg = _compose(hydra, name, overrides)
    except Exception as error:  # all of it is Hydra's answer to what a user wrote
        blamed = _blamed(hydra, name, overrides)
        yield from blamed.values() or [sentence(error)]
        if blamed:
            sound = [text for text in overrides if text not in blamed]
            keys = {*map(_key, blamed)}
            others = _composed_problems(hydra, name, sound, where, line)
            yield from (problem for problem in others if key_of(problem) not in keys)
        return
    HydraConfig.instance().set_config(cfg)
    problems = [*_folder(cfg, line.sweeps or cfg.hydra.mode is RunMode.MULTIRUN), *_load(cfg)[0]]
    problems += _without_effect(cfg, overrides)
    package = line.flags.get("--package", "_global_")
    if package != "_global_" and OmegaConf.select(cfg, package, default=None) is None:
        problems.append(f"--package is {package}; no such key")
    given = {*map(_key, line.overrides)}
    for problem in problems:
        key = key_of(problem)
        yield f"{problem} ({places[key]})" if key in places and key not in given else problem


def _blamed(hydra: Hydra, name: str, overrides: list[str]) -> dict[str, str]:
    """By override what is wrong with those that cannot even be composed alone, with the choices of groups."""
    parsed = {text: OverridesParser.create().parse_override(text) for text in overrides}
    groups = [text for text, each in parsed.items() if hydra.config_loader.get_group_options(each.key_or_group)]
    blamed: dict[str, str] = {}
    chosen: list[str] = []
    for text in dict.fromkeys([*groups, *overrides]):
        key = parsed[text].key_or_group
        try:
            _compose(hydra, name, [*chosen, text])
        except AssertionError:  # OmegaConf's only word for a key within a part that is null
            blamed[text] = f"{key} is {parsed[text].value()}; {key.rpartition('.')[0]} is null and has no keys to set"
        except Exception as error:
            why = sentence(error)
            blamed[text] = why if key in why else f"{text!r}: {why}"
        else:
            chosen += [text] if text in groups else []
    return blamed


def _without_effect(cfg: DictConfig, overrides: list[str]) -> Iterator[str]:
    """Empty mappings for keys whose names are free: Hydra adds what they have, nothing, to what is there."""
    for text in overrides:
        override = OverridesParser.create().parse_override(text)
        key = override.key_or_group
        if override.value() != {} or unknown_key(f"{key}.any name"):
            continue
        if names := list(OmegaConf.select(cfg, key, default=None) or ()):
            left_out = " ".join(f"~{key}.{name}" for name in names)
            yield f"{key} is {{}}; that takes nothing away: names are left out one by one, {left_out}"


def _key(text: str) -> str:
    return text.lstrip("+~").partition("=")[0]


# ---------------------------------------------------------------- a composed configuration


def _load(cfg: DictConfig) -> tuple[list[str], RunConfig | None]:
    plain = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(plain, dict)
    plain.pop("hydra", None)
    plugins = plain.get("plugins")
    problems = import_plugins(plugins) if isinstance(plugins, list) else []
    if problems:
        return problems, None
    try:
        # Merged again onto the schema, which refuses keys that Hydra's `+` may have added.
        typed = OmegaConf.merge(schema(), plain)
        problems = unresolved(typed, missing=True)
        if problems:
            return _without_followers(problems, plain), None
        # And once more with all references replaced: one may name a text where a part or a list belongs.
        run = OmegaConf.to_object(OmegaConf.merge(schema(), OmegaConf.to_container(typed, resolve=True)))
    except OmegaConfBaseException as error:
        return [sentence(error)], None
    assert isinstance(run, RunConfig)
    run = paths.expanded(run, RunConfig)
    return _without_followers(list(check(run)), plain), run


def _without_followers(problems: list[str], plain: dict[Any, Any]) -> list[str]:
    """Without those of keys that take their value from another one that has a problem itself."""
    references = [f"${{{key_of(problem)}}}" for problem in problems]
    return [problem for problem in problems if _raw(plain, key_of(problem)) not in references] or problems


def _raw(plain: dict[Any, Any], key: str) -> Any:
    """The value of a key as it is written."""
    value: Any = plain
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


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
    except OmegaConfBaseException:  # a key that it refers to has no value, which is a problem of that key
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


# ---------------------------------------------------------------- composing


@contextmanager
def _hydra(config_dir: str | None) -> Iterator[Hydra]:
    """Hydra as `python -m distill --config-dir DIR` starts it; a folder that is not there is a problem of its flag."""
    version.setbase("1.3")
    GlobalHydra.instance().clear()
    path = create_config_search_path(str(CONF))
    if config_dir is not None and os.path.isdir(config_dir):
        own = f"file://{os.path.abspath(config_dir)}"
        path.prepend(provider="command-line", path=own, anchor=SearchPathQuery(provider="schema"))
    before = HydraConfig.instance().cfg
    try:
        yield Hydra.create_main_hydra2("distill", path)
    finally:
        userfiles.read.clear()
        HydraConfig.instance().cfg = before
        GlobalHydra.instance().clear()


def _compose(hydra: Hydra, name: str, overrides: list[str]) -> DictConfig:
    return hydra.compose_config(name, overrides, run_mode=RunMode.RUN, with_log_configuration=False)
