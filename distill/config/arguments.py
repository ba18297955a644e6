"""A command line taken apart: Hydra's flags, and overrides; what is neither is a problem that says how to spell it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

PLAIN = {
    "-h": "--help", "-r": "--run", "-m": "--multirun", "-sc": "--shell-completion",
    "--hydra-help": "--hydra-help", "--version": "--version", "--resolve": "--resolve",
}  # fmt: skip
VALUED = {
    "-c": "--cfg", "-p": "--package", "-cp": "--config-path", "-cn": "--config-name", "-cd": "--config-dir",
    "-i": "--info", "--experimental-rerun": "--experimental-rerun",
}  # fmt: skip
CHOICES = {
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}
ACTIONS = ("--run", "--multirun", "--cfg", "--info", "--shell-completion")
"""At most one of them at a time."""
SHOWN = ("--help", "--hydra-help", "--version", "--shell-completion")
"""Hydra answers these alone, whatever else is there."""

LONG = {*PLAIN.values(), *VALUED.values()}
_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"
TYPOGRAPHIC = {each: '"' for each in "\u201c\u201d\u201e\u00ab\u00bb"} | {each: "'" for each in "\u2018\u2019\u201a"}
TYPOGRAPHIC |= dict.fromkeys(_DASHES, "-") | dict.fromkeys("\u00a0\u2007\u202f", " ")
"""What word processors and web pages make of quotes, dashes and spaces."""


@dataclass
class CommandLine:
    overrides: list[str] = field(default_factory=list)
    flags: dict[str, str] = field(default_factory=dict)
    """By long name; a flag without a value has an empty one."""
    problems: list[str] = field(default_factory=list)

    @property
    def asks(self) -> bool:
        """It asks for a help text, which takes no configuration."""
        return any(flag in self.flags for flag in SHOWN)

    @property
    def looks(self) -> bool:
        """It asks to see the configuration, which need not be complete for that."""
        return "--cfg" in self.flags or "--info" in self.flags

    @property
    def arguments(self) -> list[str]:
        """For Hydra, which takes flags only before, or only behind, the overrides."""
        flags = [f"{flag}={value}" if value else flag for flag, value in self.flags.items()]
        return [*flags, *self.overrides]


def split(arguments: list[str]) -> CommandLine:
    line = CommandLine()
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        spaced = _spaced(argument, rest)
        if spaced:
            line.problems.append(spaced)
        elif argument[:1] in ("-", *_DASHES) and argument.strip("-") and not argument[1:2].isdigit():
            _flag(argument, rest, line)
        else:
            line.overrides.append(argument)
    _agree(line)
    return line


def _spaced(argument: str, rest: list[str]) -> str | None:
    """`seed = 1`, `seed= 1` and `seed =1` are several words to a shell; takes what belongs to them off `rest`."""
    if argument.startswith("-") or "=" in argument.rstrip("=") or not argument.strip("="):
        return None
    if argument.endswith("="):
        words = rest[:1] if rest and "=" not in rest[0] and not rest[0].startswith("-") else []
    elif rest and rest[0] == "=":
        words = rest[:2]
    else:
        words = rest[:1] if rest and rest[0].startswith("=") and rest[0] != "==" else []
    if not words:
        return None
    del rest[: len(words)]
    key, value = argument.rstrip("="), "".join(words).removeprefix("=")
    spelt = shlex.quote(f"{key}={value}") if value else f"{key}=VALUE"
    return f"{' '.join([argument, *words])!r} has spaces around its =; write {spelt}"


def _flag(argument: str, rest: list[str], line: CommandLine) -> None:
    plain = "".join(TYPOGRAPHIC.get(each, each) for each in argument)
    name, equals, value = plain.partition("=")
    if len(plain.lstrip("-")) > 2 and not plain.startswith("--") and plain[0] != argument[0]:
        name = f"--{name.lstrip('-')}"  # a long dash was two
    found = _long(name)
    if found is None:
        if not equals and rest and "=" not in rest[0] and not rest[0].startswith("-"):
            value = rest.pop(0)
        spelt = shlex.quote(f"{name.lstrip('-')}={value or 'VALUE'}")
        line.problems.append(f"{argument} is no flag; a key is set without dashes, {spelt}, and --help lists the flags")
        return
    if plain != argument:
        line.problems.append(
            f"{argument!r} begins with a long dash, as documents have it; write {found}{equals}{value}"
        )
        return
    takes = found in VALUED.values() and not equals and bool(rest) and not rest[0].startswith("-")
    if takes and (found != "--info" or rest[0] in CHOICES["--info"]):
        value = rest.pop(0)
    if found == "--info" and not value:
        value = "all"  # what Hydra means; without it, it would take the next override for the value
    allowed = CHOICES.get(found)
    if found in PLAIN.values() and equals:
        line.problems.append(f"{argument}: {found} takes no value")
    elif found in VALUED.values() and found != "--info" and not value:
        line.problems.append(f"{found} has no value; write {found} {'|'.join(allowed) if allowed else 'VALUE'}")
    elif allowed and value and value not in allowed:
        line.problems.append(f"{found} is {value}; allowed: {', '.join(allowed)}")
    elif line.flags.get(found, value) != value:
        line.problems.append(f"{found} is given twice, {line.flags[found]} and {value}; once")
    else:
        line.flags[found] = value


def _long(name: str) -> str | None:
    """The long name of a flag, a short or an abbreviated one; None: there is no such flag."""
    if name in LONG:
        return name
    if name in PLAIN or name in VALUED:
        return PLAIN.get(name) or VALUED[name]
    near = [each for each in LONG if name.startswith("--") and len(name) > 3 and each.startswith(name)]
    return near[0] if len(near) == 1 else None


def _agree(line: CommandLine) -> None:
    """What flags demand of each other, and of the files that they name."""
    add = line.problems.append
    actions = [flag for flag in ACTIONS if flag in line.flags]
    if len(actions) > 1:
        add(f"{' and '.join(actions)} are given; one of them at a time")
    for flag, needed in (("--resolve", ("--cfg", "--help")), ("--package", ("--cfg",))):
        if flag in line.flags and not any(each in line.flags for each in needed):
            add(f"{flag} is given without {needed[0]}, whose output it changes; add {needed[0]} job")
    if "--config-path" in line.flags:
        add(
            f"--config-path is {line.flags['--config-path']}; it would replace the project's own folder of values: "
            "--config-dir adds another one"
        )
    if "--experimental-rerun" in line.flags:
        add("--experimental-rerun loads a pickle, which may hold any program; give the overrides of that run again")
    own = line.flags.get("--config-dir")
    if own is not None and not Path(own).is_dir():
        what = "it is a file, not a folder" if Path(own).exists() else "no such folder"
        add(f"--config-dir is {own}; {what}")
