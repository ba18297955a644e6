"""A command line taken apart by Hydra's own parser: flags and overrides; for what is neither, the way to spell it."""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import get_args_parser

from distill.config.errors import ConfigError
from distill.config.paths import home

_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"
TYPOGRAPHIC = {each: '"' for each in "\u201c\u201d\u201e\u00ab\u00bb"} | {each: "'" for each in "\u2018\u2019\u201a"}
TYPOGRAPHIC |= dict.fromkeys(_DASHES, "-") | dict.fromkeys("\u00a0\u2007\u202f", " ")
"""Quotes, dashes and spaces of word processors and web pages, and the plain ones that they replace."""

HELPS = {"--help", "--hydra-help", "--version", "--shell-completion"}
"""Flags that print a text, which takes no configuration, whatever else is given."""
PRINTS = {"--cfg", "--info"}
"""Flags that print the configuration, which need not be complete for that."""
_REFUSED = {
    "--config-path": "it would replace the project's own folder of values: --config-dir adds another one",
    "--experimental-rerun": "a rerun loads a pickle, which may hold any program: give the overrides of that run again",
}


def _refuse(message: str) -> NoReturn:
    raise ConfigError(message)


_PARSER = get_args_parser()
_PARSER.error = _refuse  # type: ignore[method-assign]
_PARSER._optionals.conflict_handler = "resolve"
_PARSER.add_argument("--version", action="store_true")  # Hydra's prints Hydra's own
_END = "\0"  # of an argument, which cannot hold it
_SPACED = re.compile(rf"(?<![^{_END}])([^{_END}=-][^{_END}=]*)(?:={_END}|{_END}={_END}?)([^{_END}=-][^{_END}=]*){_END}")
FLAGS = [name for action in _PARSER._actions for name in action.option_strings]


@dataclass
class CommandLine:
    overrides: list[str] = field(default_factory=list)
    flags: dict[str, str] = field(default_factory=dict)
    """By long name; the value of a flag that takes none is empty."""
    problems: list[str] = field(default_factory=list)

    @property
    def sweeps(self) -> bool:
        return "--multirun" in self.flags or "hydra.mode=MULTIRUN" in self.overrides

    @property
    def arguments(self) -> list[str]:
        """For Hydra, flags first."""
        flags = [f"{flag}={value}" if value else flag for flag, value in self.flags.items()]
        return [*flags, *self.overrides]


def split(arguments: list[str]) -> CommandLine:
    line = CommandLine()
    rest, words = _joined(arguments, line.problems), []
    while rest:
        argument = rest.pop(0)
        if problem := _no_flag(argument, rest):
            line.problems.append(problem)
        elif argument in ("--info", "-i") and not (rest and rest[0].isalpha()):
            words.append("--info=all")  # else Hydra's parser takes the next override for the value
        else:
            words.append(argument)
    try:
        parsed, others = _PARSER.parse_known_intermixed_args(words)
    except ConfigError as refused:
        line.problems.append(str(refused))
        line.overrides = [word for word in words if "=" in word and not word.startswith("-")]
        return line
    line.overrides = [*parsed.overrides, *others]
    for action in _PARSER._actions:
        value = getattr(parsed, action.dest)
        if action.option_strings and value not in (None, False):
            flag = next(name for name in action.option_strings if name.startswith("--"))
            line.flags[flag] = "" if value is True else value
    if "--config-dir" in line.flags:
        line.flags["--config-dir"] = home(line.flags["--config-dir"])
    line.problems += _unfit(line.flags)
    return line


def _joined(arguments: list[str], problems: list[str]) -> list[str]:
    """The arguments without `seed = 1`, `seed= 1` and `seed =1`, which are several words to a shell."""

    def note(words: re.Match[str]) -> str:
        spelt = shlex.quote(f"{words[1]}={words[2]}")
        problems.append(f"{words[0].replace(_END, ' ').strip()!r} has spaces around its =; write {spelt}")
        return ""

    return _SPACED.sub(note, "".join(f"{each}{_END}" for each in arguments)).split(_END)[:-1]


def _no_flag(argument: str, rest: list[str]) -> str | None:
    """A word that begins with a dash and is no flag; takes the value that was meant for it off `rest`."""
    if argument[:1] not in ("-", *_DASHES) or not argument.strip("-") or argument[1:2].isdigit():
        return None
    bare = "".join(TYPOGRAPHIC.get(each, each) for each in argument).lstrip("-")
    name, equals, value = bare.partition("=")
    known = any(flag.startswith(f"--{name}") or flag == f"-{name}" for flag in FLAGS)
    if known and argument[0] != "-":
        return f"{argument!r} begins with a long dash, as documents have it; write --{bare}"
    if known:
        return None
    if not equals and rest and "=" not in rest[0] and not rest[0].startswith("-"):
        value = rest.pop(0)
    spelt = shlex.quote(f"{name}={value or 'VALUE'}")
    return f"{argument} is no flag; a key is set without dashes, {spelt}, and --help lists the flags"


def _unfit(flags: dict[str, str]) -> list[str]:
    """Problems of flags with each other, and with the files that they name."""
    problems = [f"{flag} is {flags[flag]}; {why}" for flag, why in _REFUSED.items() if flag in flags]
    actions = [flag for flag in ("--run", "--multirun", "--cfg", "--info", "--shell-completion") if flag in flags]
    if len(actions) > 1:
        problems.append(f"{' and '.join(actions)} are given; one of them at a time")
    for flag, others in (("--resolve", ("--cfg", "--help")), ("--package", ("--cfg",))):
        if flag in flags and not any(other in flags for other in others):
            problems.append(f"{flag} is given without {others[0]}, whose output it changes; add {others[0]} job")
    own = flags.get("--config-dir")
    if own is not None and not Path(own).is_dir():
        what = "it is a file, not a folder" if Path(own).exists() else "no such folder"
        problems.append(f"--config-dir is {own}; {what}")
    return problems
