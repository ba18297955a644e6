"""The YAML files that a user adds with `--config-dir`: read strictly, every fault with file, line and column.

Hydra stops at the first fault, takes a file without its package line for something else, and reads a byte order mark
as part of that line. Only files that are chosen are looked at: other YAML may lie beside them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader

from distill.config.keys import unknown_key

PACKAGE_LINE = "# @package _global_"


class FileConfigSource(file_config_source.FileConfigSource):
    """Hydra's own, but a byte order mark at the start of a file is no part of it."""

    def load_config(self, config_path: str) -> ConfigResult:
        found = super().load_config(config_path)
        path = os.path.join(self.path, self._normalize_file_name(config_path))
        with open(path, encoding="utf-8-sig") as file:
            found.header = ConfigSource._get_header_dict(file.read(512))
        return found


Plugins.instance()  # registers Hydra's
SourcesRegistry.instance().types["file"] = FileConfigSource


@dataclass
class Files:
    """What the chosen files of a user say, and what is wrong with them."""

    folders: list[Path]
    """The user's, in the order in which Hydra looks through them; ours comes first."""
    ours: Path
    values: dict[str, tuple[Any, str]] = field(default_factory=dict)
    """By key, for the last file that sets it: value, and `FILE, line L, column C`."""
    problems: list[str] = field(default_factory=list)
    _seen: set[Path] = field(default_factory=set)

    def choices(self, group: str) -> list[str]:
        """Names that a group has, ours and the user's."""
        found = set()
        for folder in (self.ours, *self.folders):
            base = folder / group
            found |= {path.relative_to(base).with_suffix("").as_posix() for path in base.rglob("*.yaml")}
        return sorted(found)

    def is_group(self, group: str) -> bool:
        return any((folder / group).is_dir() for folder in (self.ours, *self.folders))

    @functools.cached_property
    def chosen(self) -> list[str]:
        """Groups, with their packages, that our root file chooses."""
        entries = OmegaConf.to_container(OmegaConf.load(self.ours / "config.yaml").defaults)
        assert isinstance(entries, list)
        return [str(key) for entry in entries if isinstance(entry, dict) for key in entry]

    def choose(self, group: str, name: str, package: str | None) -> None:
        """Looks at the user's file of this name, if there is one, and at those that it names in its defaults.

        package: where its values go, `None`: below the group, or where its own first line says.
        """
        for folder in self.folders:
            path = folder / group / f"{name}.yaml"
            if not path.is_file() or path in self._seen:
                continue
            self._seen.add(path)
            twin = self.ours / group / f"{name}.yaml"
            if twin.is_file() and twin.read_bytes() != path.read_bytes():
                self.problems.append(
                    f"{path} has the name of one of the project's own files, which would win; rename it, and choose "
                    f"it by that name"
                )
                return
            try:
                self._read(path, group, package)
            except OSError as error:
                self.problems.append(f"{path}: {error.strerror or error}")
            return

    def why_not(self, group: str, name: str) -> str:
        """What a user may have meant by a name that the group lacks; empty: nobody knows."""
        plain = Path(name.removesuffix(".yaml").removesuffix(".yml"))
        if plain.as_posix() != name and plain.as_posix() in self.choices(group):
            return f"; write {group}={plain}"
        if os.path.isfile(name):
            return (
                f"; a file is chosen by its name: put it into a folder DIR/{group}/ and write --config-dir DIR "
                f"{group}={plain.stem}"
            )
        for folder in self.folders:
            if (other := folder / group / f"{plain}.yml").is_file():
                return f"; {other} must end in .yaml"
            if (other := folder / f"{plain}.yaml").is_file():
                return f"; {other} must lie in {folder / group}/"
        return ""

    def _read(self, path: Path, group: str, package: str | None) -> None:
        data = path.read_bytes()
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            column = error.start - (data.rfind(b"\n", 0, error.start) + 1) + 1
            self.problems.append(
                f"{path}, line {line}, column {column}: byte 0x{data[error.start]:02x} is not UTF-8; save the file "
                "as UTF-8"
            )
            return
        found = _Yaml(path, text, self.problems)
        if found.root is None:
            return
        try:
            named = ConfigSource._get_header_dict(text[:512])["package"]
        except ValueError:
            named = "?"
        if group:
            if named is None and package is None and not self._is_key(group):
                self.problems.append(
                    f"{path}: its first line must be `{PACKAGE_LINE}`; without it all values would land below "
                    f"`{group}.`, where there are no keys"
                )
                return
            if named is not None and not self._is_package(named):
                self.problems.append(f"{path}: its package line names no place for values; write `{PACKAGE_LINE}`")
                return
            where = package if package is not None else named if named is not None else group.replace("/", ".")
        else:
            where = "_global_"
        prefix = "" if where in ("_global_", "_root_") else f"{where.removeprefix('_global_.')}."
        for place, entry in found.defaults():
            self._default(f"{path}, {place}", group, entry)
        for key, value, place in found.leaves(prefix):
            self.values[key] = value, f"{path}, {place}"

    def _is_key(self, path: str) -> bool:
        return unknown_key(path.replace("/", ".")) is None

    def _is_package(self, package: str) -> bool:
        plain = package.removeprefix("_global_").removeprefix(".")
        return not plain or plain.startswith("_") or self._is_key(plain)

    def _default(self, place: str, group: str, entry: Any) -> None:
        """One entry of a file's list `defaults`."""
        if isinstance(entry, str):
            name, other = entry, group
            if name == "_self_":
                return
            if name.startswith("/"):
                other, _, name = name.strip("/").rpartition("/")
            package: str | None = None
        elif isinstance(entry, dict) and len(entry) == 1:
            ((key, name),) = entry.items()
            words = str(key).split()
            other, _, at = words[-1].partition("@")
            package = at or None
            overrides = "override" in words[:-1]
            if not other.startswith("/") and not self.is_group(f"{group}/{other}"):
                better = f"{' '.join([*words[:-1], ''])}/{words[-1]}" if self.is_group(other) else ""
                self.problems.append(
                    f"{place}: defaults has {key}: {name}; "
                    + (f"write `{better}: {name}`, or it is looked for in {group}/" if better else "no such group")
                )
                return
            other = other.strip("/") if other.startswith("/") else f"{group}/{other}"
            if not overrides and words[-1].strip("/") in self.chosen:
                self.problems.append(
                    f"{place}: defaults has {key}: {name}; config.yaml chooses one already: write `override "
                    f"/{words[-1].strip('/')}: {name}`"
                )
                return
        else:
            self.problems.append(f"{place}: defaults has {entry!r:.200}; allowed: NAME, or GROUP: NAME")
            return
        if name is None or not self.is_group(other):
            if name is not None:
                self.problems.append(f"{place}: defaults has the group {other}; no such group")
            return
        for each in name if isinstance(name, list) else [name]:
            each = str(each)
            if "${" not in each and each not in self.choices(other):
                allowed = ", ".join(self.choices(other))
                self.problems.append(f"{place}: {other} is {each}; allowed: {allowed}{self.why_not(other, each)}")
            else:
                self.choose(other, each, package)


class _Yaml:
    """A file's nodes."""

    def __init__(self, path: Path, text: str, problems: list[str]):
        self.path, self.problems = path, problems
        self.root: Any = None
        self.loader: Any = get_yaml_loader()
        try:
            root = yaml.compose(text, Loader=self.loader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            what = " ".join(part for part in (error.context, error.problem) if part)
            if "\\t" in what:
                what = "a tab; YAML indents with spaces alone"
            elif error.context == "while scanning a simple key":
                mark, what = (
                    error.context_mark,
                    "a line without a key; write `key: value`, with a space behind the colon",
                )
            self.problems.append(f"{path}{f', {_place(mark)}' if mark else ''}: {what}")
            return
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            self.problems.append(f"{path}: {str(error).splitlines()[0]}")
            return
        if root is None:
            self.problems.append(f"{path} is empty; it has no values")
        elif not isinstance(root, yaml.MappingNode):
            kind = "a list" if isinstance(root, yaml.SequenceNode) else "one value"
            self.problems.append(f"{path}: it is {kind}; a configuration is lines of `key: value`")
        else:
            before = len(problems)
            self._twice(root, set())
            self.root = root if len(problems) == before else None

    def _twice(self, node: Any, above: set[int]) -> None:
        """Keys that a mapping has twice, and an alias within what it names."""
        if id(node) in above:
            self.problems.append(f"{self.path}, {_place(node.start_mark)}: an alias within what it names")
            return
        if isinstance(node, yaml.SequenceNode):
            for each in node.value:
                self._twice(each, above | {id(node)})
        elif isinstance(node, yaml.MappingNode):
            first: dict[str, Any] = {}
            for key, value in node.value:
                text = str(key.value)
                if text in first and text != "<<":
                    self.problems.append(
                        f"{self.path}, {_place(key.start_mark)}: {text} is given twice, first in line "
                        f"{first[text].line + 1}; once"
                    )
                elif isinstance(key, yaml.ScalarNode) and key.tag in _OTHER_KEYS:
                    self.problems.append(
                        f"{self.path}, {_place(key.start_mark)}: the key {text} reads as {_OTHER_KEYS[key.tag]}; "
                        f"write '{text}' in quotes"
                    )
                first.setdefault(text, key.start_mark)
                self._twice(value, above | {id(node)})

    def defaults(self) -> Iterator[tuple[str, Any]]:
        """Place and value of each entry of `defaults`."""
        for key, value in self.root.value:
            if key.value != "defaults":
                continue
            if not isinstance(value, yaml.SequenceNode):
                self.problems.append(f"{self.path}, {_place(key.start_mark)}: defaults must be a list, lines of `- `")
                continue
            for entry in value.value:
                yield _place(entry.start_mark), self._built(entry)

    def leaves(self, prefix: str) -> Iterator[tuple[str, Any, str]]:
        """Key, value and place of each value; of the list `defaults` none."""
        for key, value in self.root.value:
            if key.value != "defaults":
                yield from self._leaves(key, value, prefix)

    def _leaves(self, key: Any, value: Any, prefix: str) -> Iterator[tuple[str, Any, str]]:
        name = f"{prefix}{key.value}"
        if key.value == "<<":
            for each in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                for inner, below in each.value if isinstance(each, yaml.MappingNode) else ():
                    yield from self._leaves(inner, below, prefix)
        elif isinstance(value, yaml.MappingNode) and value.value:
            for inner, below in value.value:
                yield from self._leaves(inner, below, f"{name}.")
        else:
            yield name, self._built(value), _place(key.start_mark)

    def _built(self, node: Any) -> Any:
        """What a node says, as OmegaConf reads it."""
        loader = self.loader("")
        try:
            return loader.construct_document(node)
        except yaml.YAMLError as error:
            return f"({str(error).splitlines()[0]})"
        finally:
            loader.dispose()


_OTHER_KEYS = {
    "tag:yaml.org,2002:bool": "true or false",
    "tag:yaml.org,2002:int": "a number",
    "tag:yaml.org,2002:float": "a number",
    "tag:yaml.org,2002:null": "null",
}


def _place(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"
