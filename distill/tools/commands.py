"""The command line of the cache's tools: `codistill-cache stats DIR` and so on.

Each command is a module of `distill.tools` that holds `add_arguments(parser)` and `run(args)`, which returns the exit
code: 0, or 1 where the answer is no. The module is imported when its command is on the command line, and imports torch,
pyarrow and the like when it runs, so what reads headers alone answers at once.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

from distill import __version__
from distill.config import stop
from distill.config.errors import ConfigError, UserError, print_error
from distill.config.registry import import_plugins
from distill.config.streams import silence


class Command(NamedTuple):
    """One word after the program's name."""

    help: str
    module: str

    def load(self) -> Any:
        """The module with `add_arguments` and `run`."""
        return import_module(self.module)


COMMANDS = {
    "stats": Command("what a cache holds, what its bytes are, how far its teacher was behind", "distill.tools.stats"),
    "verify": Command("every byte against its digest; exit code 1 if there is damage", "distill.tools.verify"),
    "repair": Command("make a damaged cache readable again, without losing what is good", "distill.tools.repair"),
    "compact": Command("many shards into few, without superseded records", "distill.tools.compact"),
    "index": Command("one listing of all shards, so that a cache opens fast at any size", "distill.tools.index_cache"),
    "merge": Command("several caches of one corpus into one", "distill.tools.merge"),
    "compare": Command("two caches, record by record; exit code 1 if they differ", "distill.tools.compare"),
    "export": Command("a cache as a Parquet file, for other tools", "distill.tools.export_cache"),
    "import": Command("soft targets of other stacks into a cache", "distill.tools.import_cache"),
    "estimate": Command("size and hours of a cache before it is written", "distill.tools.estimate"),
}


class Parser(argparse.ArgumentParser):
    """Prints one line about what is wrong, not the whole usage."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {' '.join(message.split())}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    What a person can mend is one line per problem and exit code 2. A closed pipe ends a tool as it does others.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = Parser(prog="codistill-cache", description="Tools for caches of soft targets.")
    parser.add_argument("--version", action="version", version=f"codistill {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        sub = subparsers.add_parser(name, help=command.help, description=command.help)
        if arguments and arguments[0] == name:
            what = "adds codecs of one's own; as often as needed"
            sub.add_argument("--plugins", action="append", default=[], metavar="MODULE", help=what)
            command.load().add_arguments(sub)
    args = parser.parse_args(arguments)
    try:
        _no_empty(args)
        if problems := import_plugins(args.plugins):
            raise ConfigError("\n".join(problems))
        code: int = COMMANDS[args.command].load().run(args)
        sys.stdout.flush()  # Python would as it ends, and complain about a pipe that is closed
        return code
    except BrokenPipeError:  # the reading end has closed
        silence(sys.stdout)
        return 128 + signal.SIGPIPE
    except (UserError, OSError) as error:
        return print_error(error)
    except KeyboardInterrupt:
        print("interrupted: what has been published is whole", file=sys.stderr)
        return stop.EXIT_CODES[signal.SIGINT]


def _no_empty(args: argparse.Namespace) -> None:
    """ConfigError for an empty path, which would be the working folder: mostly it is a variable that is not set."""
    for name, value in vars(args).items():
        if name not in ("bos", "eos") and "" in (value if isinstance(value, list) else [value]):
            raise ConfigError(
                f"{name.upper() if name in ('dir', 'a', 'b', 'file') else name} is empty; give it a value"
            )
