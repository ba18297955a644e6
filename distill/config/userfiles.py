"""The YAML files that a user adds with `--config-dir` or `hydra.searchpath`, read strictly.

Hydra reads every file through `RecordingSource`, which records those that are not the project's own. A fault has its
file, line and column. A file that no configuration chooses is never read: other YAML may lie beside those that are.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.default_element import ResultDefault
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader

from distill.config.keys import unknown_key, wrong_value
from distill.config.sentences import sentence

_PACKAGE = Path(__file__).resolve().parents[1]
CONF = next(folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if (folder / "config.yaml").is_file())
"""The project's own files: within the package where it was built into a wheel, beside it in a clone."""

_PACKAGE_LINE = "its first line must be `# @package _global_`"


@dataclass
class UserFile:
    path: Path
    text: str = ""
    problems: list[str] = field(default_factory=list)
    values: dict[str, tuple[Any, str]] = field(default_factory=dict)
    """By key within the file: value and place, `FILE, line L, column C`."""
    defaults: list[tuple[set[str], str]] = field(default_factory=list)
    """Words and place of each entry of its list `defaults`."""


read: dict[Path, UserFile] = {}
"""The user's files that Hydra has loaded for the configuration that it is composing."""


class RecordingSource(file_config_source.FileConfigSource):
    """Hydra's source of files. A file of the user with a problem is empty to Hydra, which would stop at the first one;
    `load` refuses a configuration that such a file is part of."""

    def load_config(self, config_path: str) -> ConfigResult:
        path = Path(self.path, self._normalize_file_name(config_path))
        if path.is_relative_to(CONF):
            return super().load_config(config_path)
        file = read[path] = _read(path)
        try:
            header = ConfigSource._get_header_dict(file.text[:512])
        except ValueError as error:
            file.problems.append(f"{path}: {error}; {_PACKAGE_LINE}")
        if file.problems:
            header = {"package": "_global_"}
        config = OmegaConf.create("{}" if file.problems else file.text)
        return ConfigResult(provider=self.provider, path=f"file://{self.path}", config=config, header=header)


Plugins.instance()  # registers Hydra's
SourcesRegistry.instance().types["file"] = RecordingSource


def folders(repository: IConfigRepository) -> list[Path]:
    """The user's, in the order in which Hydra searches them."""
    return [Path(each.path) for each in repository.get_sources() if each.scheme() == "file" and each.path != str(CONF)]


def check(entries: Iterable[ResultDefault], where: list[Path], problems: list[str]) -> dict[str, str]:
    """Adds the problems of the user's files in a defaults list, each value alone.

    Args:
        where: the user's folders.

    Returns:
        By key, where the last file that sets it does so.
    """
    places = {}
    for entry in entries:
        name = f"{entry.config_path}.yaml"
        for path in (folder / name for folder in where if (folder / name).is_file()):
            if (CONF / name).is_file() and (CONF / name).read_bytes() != path.read_bytes():
                problems.append(
                    f"{path} has the name of one of the project's own files, which Hydra would load; rename it, and "
                    "choose it by that name"
                )
            file, package = read.get(path, UserFile(path)), entry.package or ""
            problems += file.problems
            foreign = package and unknown_key(package)
            if foreign and not file.problems:
                problems.append(
                    f"{path}: its values would be put below `{package}.`, where there are no keys; {_PACKAGE_LINE}"
                )
            for key, (value, place) in () if foreign or file.problems else file.values.items():
                key = f"{package}.{key}" if package else key
                places[key] = place
                if problem := unknown_key(key) or wrong_value(key, value):
                    problems.append(f"{problem} ({place})")
    return places


def defaults_problem(error: Exception) -> str:
    """Why Hydra cannot make one list of the lists `defaults` of all files, with the user's entry that is to blame."""
    text = sentence(error)
    words = {*re.findall(r"\w+", text)}
    for file in read.values():
        for named, place in file.defaults:
            if named & words:
                return f"{place}: {text}"
    return text


def hint(group: str, name: str, where: list[Path]) -> str:
    """How to choose a file that has the name, or nearly, but that its group lacks; empty: there is none."""
    stem = Path(name).stem
    for folder in where:
        for path in (
            Path(name),
            *(folder / each / f"{stem}.{suffix}" for each in (group, "") for suffix in ("yaml", "yml")),
        ):
            if path.is_file():
                return (
                    f"; {path} is chosen by {group}={stem} where it is DIR/{group}/{stem}.yaml, with --config-dir DIR"
                )
    return ""


def _read(path: Path) -> UserFile:
    file = UserFile(path)
    try:
        file.text = path.read_bytes().decode("utf-8-sig")
        values = yaml.load(file.text, Loader=get_yaml_loader())
        if isinstance(values, dict):
            _walk(file, yaml.compose(file.text, Loader=get_yaml_loader()), values, "")
        else:
            what = "is empty" if values is None else f"is {values!r:.40}"
            file.problems.append(f"{path} {what}; a configuration is lines of `key: value`")
    except OSError as error:
        file.problems.append(f"{path}: {error.strerror}")
    except UnicodeDecodeError as error:
        before = error.object[: error.start].split(b"\n")
        place = f"line {len(before)}, column {len(before[-1]) + 1}"
        byte = error.object[error.start]
        file.problems.append(f"{path}, {place}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8")
    except yaml.MarkedYAMLError as error:
        scanned = isinstance(error, yaml.scanner.ScannerError)
        mark = (scanned and error.context_mark) or error.problem_mark
        why = " ".join(part for part in (error.context, error.problem) if part)
        way_out = "; lines are `key: value`, with a space behind the colon, indented by spaces alone" if scanned else ""
        file.problems.append(f"{_place(path, mark)}: {why}{way_out}")
    except RecursionError:
        file.problems.append(f"{path}: an alias within what it names")
    except (yaml.YAMLError, ValueError) as error:
        file.problems.append(f"{path}: {str(error).splitlines()[0]}")
    return file


def _walk(file: UserFile, node: Any, values: Any, prefix: str) -> None:
    """Notes the values of a mapping, at any depth, and of the list `defaults` at the top its entries."""
    for key, below in node.value:
        name, place = f"{prefix}{key.value}", _place(file.path, key.start_mark)
        if key.tag == "tag:yaml.org,2002:merge":
            for each in below.value if isinstance(below, yaml.SequenceNode) else [below]:
                _walk(file, each, values, prefix)
        elif key.tag != "tag:yaml.org,2002:str":
            file.problems.append(f"{place}: the key {key.value} is no text to YAML; write '{key.value}' in quotes")
        elif name == "defaults":
            for entry in below.value if isinstance(below, yaml.SequenceNode) else []:
                words = {*re.findall(r"\w+", str(yaml.serialize(entry)))} - {"override", "optional", "_self_"}
                file.defaults.append((words, _place(file.path, entry.start_mark)))
            file.defaults.append(({"defaults"}, place))
        elif isinstance(below, yaml.MappingNode) and below.value and not _has_paths(values[key.value]):
            _walk(file, below, values[key.value], f"{name}.")
        else:
            file.values[name] = values[key.value], place


def _has_paths(values: Any) -> bool:
    """Keys of a mapping are paths within another configuration, as those of a study's arms are."""
    return any("." in str(key) for key in values)


def _place(path: Path, mark: Any) -> str:
    return f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
