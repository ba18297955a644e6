"""The command line of the cache's tools: `codistill-cache stats DIR` and so on.

Each command's libraries are loaded when it runs: what only looks at headers and ledgers answers at once. Longer than
other files, so that all commands and their arguments are read in one place.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from distill import __version__
from distill.config import json_text, stop
from distill.config.errors import ConfigError, UserError
from distill.config.files import NO_ROOM
from distill.config.paths import home
from distill.config.streams import silence


class Parser(argparse.ArgumentParser):
    """Of one line about what is wrong, not the whole usage."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {' '.join(message.split())}; {self.prog} --help says more", file=sys.stderr)
        sys.exit(2)


class Command(NamedTuple):
    """One word after the program's name."""

    help: str
    add: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], int]
    """The exit code: 0, or 1 where the answer is no."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 2 and one line per fault for what a person can mend; a closed pipe ends a tool as it does others."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = Parser(prog="codistill-cache", description="Tools for caches of soft targets.")
    parser.add_argument("--version", action="version", version=f"codistill {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        sub = subparsers.add_parser(name, help=command.help, description=command.help)
        if arguments and arguments[0] == name:
            command.add(sub)  # the others' arguments may need libraries that take seconds to load
    args = parser.parse_args(arguments)
    try:
        _no_empty(args)
        code = COMMANDS[args.command].run(args)
        sys.stdout.flush()  # Python would as it ends, and complain about a pipe that is closed
        return code
    except UserError as error:
        lines = str(error).splitlines()
    except BrokenPipeError:  # whoever reads has seen enough
        silence(sys.stdout)
        return 128 + signal.SIGPIPE
    except OSError as error:
        if not (error.filename or error.errno in NO_ROOM):
            raise
        lines = [str(error)]
    except KeyboardInterrupt:
        print("interrupted: what has been published is whole", file=sys.stderr)
        return stop.EXIT_CODES[signal.SIGINT]
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    return 2


def _no_empty(args: argparse.Namespace) -> None:
    """ConfigError for an empty path, which would be the working folder: mostly it is a variable that is not set."""
    for name, value in vars(args).items():
        if name not in ("bos", "eos") and "" in (value if isinstance(value, list) else [value]):
            raise ConfigError(
                f"{name.upper() if name in ('dir', 'a', 'b', 'file') else name} is empty; give it a value"
            )


def _distinct(source: str, target: str) -> None:
    """ConfigError where two spellings are one cache."""
    if os.path.realpath(source) == os.path.realpath(target) or source.rstrip("/") == target.rstrip("/"):
        raise ConfigError(f"{target} is both a source and the target")


def _folder(
    parser: Parser, what: str = "a cache, or a folder of caches; a path or a URL like s3://bucket/folder"
) -> None:
    parser.add_argument("dir", metavar="DIR", type=home, help=what)


def _json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object a cache, for programs")


def _print(found: Any) -> None:
    print(json_text.dumps(found))


# ---------------------------------------------------------------- stats


def _stats_arguments(parser: Parser) -> None:
    _folder(parser)
    _json(parser)
    parser.add_argument(
        "--quick", action="store_true", help="header and ledgers alone; coverage is an upper bound then"
    )
    parser.add_argument(
        "--deep", type=int, nargs="?", const=256, metavar="SAMPLES",
        help="decode so many samples, always the same ones, for histograms (%(const)s)",
    )  # fmt: skip
    parser.add_argument(
        "--html", metavar="FILE", type=home, help="write all of it as a page with pictures, too (includes --deep)"
    )


def _stats(args: argparse.Namespace) -> int:
    from distill.tools import show
    from distill.tools.common import caches
    from distill.tools.stats import stats

    if args.deep is not None and args.deep < 1:
        raise ConfigError(f"--deep is {args.deep}; it is at least 1")
    deep = args.deep or (256 if args.html else None)
    everything = []
    for number, store in enumerate(caches(args.dir)):
        found = stats(store, quick=args.quick)
        if deep is not None and found["records"]:
            from distill.tools.sampled import sampled

            found["sampled"] = sampled(store, deep)
        everything.append(found)
        if args.json:
            _print(found)
        else:
            lines = show.stats_lines(found) + (show.histogram_lines(found["sampled"]) if "sampled" in found else [])
            print(("\n" if number else "") + "\n".join(lines), flush=True)
    if args.html:
        from distill.tools.cache_page import write

        write(args.html, everything)
        if not args.json:
            print(f"\n{args.html}")
    return 0


# ---------------------------------------------------------------- verify, repair


def _verify_arguments(parser: Parser) -> None:
    _folder(parser)
    _json(parser)
    parser.add_argument("--decode", action="store_true", help="take every record apart, too")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="shards at a time (%(default)s)")


def _verify(args: argparse.Namespace) -> int:
    from distill.tools import show
    from distill.tools.common import caches
    from distill.tools.verify import verify

    if args.jobs < 1:
        raise ConfigError(f"--jobs is {args.jobs}; it is at least 1")
    bad = 0
    for store in caches(args.dir):
        found = verify(store, decode=args.decode, jobs=args.jobs)
        bad += len(found.problems)
        if args.json:
            _print({"folder": store.root} | found._asdict())
            continue
        for problem in found.problems:
            print(f"damage: {problem}")
        for note in found.notes:
            print(f"note: {note}")
        verdict = f"{len(found.problems)} problems" if found.problems else "whole"
        print(
            f"{store.root}: {verdict}; {show.number(found.samples)} records in {found.shards} shards of "
            f"{show.size(found.bytes)}"
        )
    return 1 if bad else 0


def _repair_arguments(parser: Parser) -> None:
    _folder(parser)
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and change nothing")


def _repair(args: argparse.Namespace) -> int:
    from distill.tools.common import caches, ranges
    from distill.tools.repair import repair

    for store in caches(args.dir):
        done = repair(store, dry_run=args.dry_run)
        for line in done.lines:
            print(line)
        print(
            f"{store.root}: {'would be ' if args.dry_run else ''}{'repaired' if done.lines else 'whole, nothing to do'}"
            + (f"; {done.saved} records saved" if done.saved else "")
        )
        if done.lost:
            older = sorted(set(done.lost) - set(done.uncovered))
            print(f"  lost: newest records of {len(done.lost)} samples: {ranges(done.lost)}")
            if older:
                print(f"  of these an older record is left: {ranges(older)}")
    return 0


# ---------------------------------------------------------------- compact, merge, compare


def _shard_mb(parser: Parser) -> None:
    parser.add_argument(
        "--shard-mb",
        type=int,
        default=512,
        metavar="MB",
        help="size of a shard; memory is three times that (%(default)s)",
    )


def _shard_bytes(args: argparse.Namespace) -> int:
    if not 1 <= args.shard_mb <= 4000:
        raise ConfigError(f"--shard-mb is {args.shard_mb}; allowed is 1 to 4000")
    return int(args.shard_mb) * 1_000_000


def _compact_arguments(parser: Parser) -> None:
    _folder(parser)
    _shard_mb(parser)
    parser.add_argument(
        "--purge", action="store_true",
        help="remove the files of replaced shards; views from before the compaction cannot be read any more",
    )  # fmt: skip
    parser.add_argument(
        "--into",
        metavar="NEW",
        type=home,
        help="leave the cache as it is and write a compact one there",
    )


def _compact(args: argparse.Namespace) -> int:
    from distill.cache.open_store import open_store
    from distill.tools import show
    from distill.tools.common import caches
    from distill.tools.compact import compact
    from distill.tools.merge import merge

    if args.into and args.purge:
        raise ConfigError("--purge is no option of --into, which replaces nothing")
    size, stores = _shard_bytes(args), caches(args.dir)
    for store in stores:
        if args.into:
            alone = len(stores) == 1
            _distinct(store.root, args.into)
            target = open_store(args.into if alone else f"{args.into.rstrip('/')}/{store.root.rsplit('/', 1)[-1]}")
            merged = merge([store], target, shard_bytes=size)
            print(
                f"{store.root}: {show.number(merged.copied)} records in {merged.shards} shards, "
                f"{show.size(merged.bytes)}, in {target.root}"
            )
            continue
        done = compact(store, shard_bytes=size, purge=args.purge)
        print(
            f"{store.root}: {done.before} shards of {show.size(done.bytes_before)} are {done.after} of "
            f"{show.size(done.bytes_after)}; {show.number(done.copied)} records copied, "
            f"{show.number(done.dropped)} superseded ones left behind"
        )
        if done.purged:
            print(f"  removed {show.size(done.purged)} of replaced files")
        if done.waiting:
            print(f"  {show.size(done.waiting)} of replaced files stay until compact --purge")
    return 0


def _merge_arguments(parser: Parser) -> None:
    parser.add_argument(
        "sources", nargs="+", metavar="SRC", type=home, help="caches of one corpus, tokenizer, codec and seed"
    )
    _folder(parser, "the cache that takes their records; made if need be")
    _shard_mb(parser)


def _merge(args: argparse.Namespace) -> int:
    from distill.cache.open_store import open_store
    from distill.tools import show
    from distill.tools.merge import merge

    for source in args.sources:
        _distinct(source, args.dir)
    done = merge([open_store(each) for each in args.sources], open_store(args.dir), shard_bytes=_shard_bytes(args))
    print(
        f"{args.dir}: {show.number(done.copied)} records in {done.shards} new shards of {show.size(done.bytes)}; "
        f"{show.number(done.passed)} were there already, or had a later one"
    )
    return 0


def _compare_arguments(parser: Parser) -> None:
    parser.add_argument("a", metavar="A", type=home, help="a cache")
    parser.add_argument("b", metavar="B", type=home, help="another one of the same corpus")
    _json(parser)
    parser.add_argument(
        "--tolerance", type=float, default=0.0, metavar="TV",
        help="equal all the same if the mean total variation distance of a token is at most this (%(default)s)",
    )  # fmt: skip


def _compare(args: argparse.Namespace) -> int:
    from distill.cache.open_store import open_store
    from distill.tools.compare import compare

    if not 0 <= args.tolerance <= 1:
        raise ConfigError(f"--tolerance is {args.tolerance}; allowed is 0 to 1")
    found = compare(open_store(args.a), open_store(args.b))
    same = found.same(args.tolerance)
    if args.json:
        _print(dataclasses.asdict(found) | {"same": same})
        return 0 if same else 1
    for line in found.headers:
        print(f"header: {line}")
    print(f"samples in A alone: {found.only_a}; in B alone: {found.only_b}")
    print(f"records of the same bytes: {found.equal}; of others: {found.different}")
    if found.other_tokens:
        print(f"samples whose teachers saw other tokens: {found.other_tokens}")
    if found.other_step or found.other_teacher:
        print(f"records of another step: {found.other_step}; of another teacher: {found.other_teacher} (not compared)")
    if found.different:
        print(
            f"tokens that differ: {found.tokens_different} of {found.tokens}; with a target in one alone: "
            f"{found.tokens_one_side}"
        )
        print(
            f"probabilities: largest difference {found.largest_p:.6f}, mean {found.mean_p:.6f} over atoms of tokens "
            "that differ"
        )
        print(f"total variation: mean {found.mean_tv:.6f} over all tokens, largest {found.largest_tv:.6f}")
        print(f"log p(label): largest difference {found.largest_label:.4f}; entropy: {found.largest_entropy:.4f} nats")
    print("equal" if same and not found.different else "equal within the tolerance" if same else "different")
    return 0 if same else 1


# ---------------------------------------------------------------- estimate


def _estimate_arguments(parser: Parser) -> None:
    from distill.tools.estimate_command import add_arguments

    add_arguments(parser)


def _estimate(args: argparse.Namespace) -> int:
    from distill.tools.estimate_command import run

    return run(args)


# ---------------------------------------------------------------- import, export


def _import_arguments(parser: Parser) -> None:
    from distill.tools.import_cache import add_arguments

    add_arguments(parser)


def _import(args: argparse.Namespace) -> int:
    from distill.tools.import_cache import run

    run(args)
    return 0


def _export_arguments(parser: Parser) -> None:
    _folder(parser, "a cache; a path or a URL")
    parser.add_argument("file", metavar="FILE", type=home, help="the Parquet file")
    parser.add_argument("--per", choices=["token", "sample"], default="sample", help="what a row is (%(default)s)")


def _export(args: argparse.Namespace) -> int:
    from distill.cache.reader import CacheReader
    from distill.tools import show
    from distill.tools.export_cache import Per, export

    done = export(CacheReader(args.dir), args.file, Per(args.per))
    print(
        f"{args.file}: {show.number(done['rows'])} rows, {show.number(done['tokens'])} tokens, "
        f"{show.size(done['bytes'])}"
    )
    return 0


COMMANDS = {
    "stats": Command(
        "what a cache holds, what its bytes are, how far its teacher was behind", _stats_arguments, _stats
    ),
    "verify": Command("every byte against its digest; exit code 1 if there is damage", _verify_arguments, _verify),
    "repair": Command("make a damaged cache readable again, without losing what is good", _repair_arguments, _repair),
    "compact": Command("many shards into few, without superseded records", _compact_arguments, _compact),
    "merge": Command("several caches of one corpus into one", _merge_arguments, _merge),
    "compare": Command("two caches, record by record; exit code 1 if they differ", _compare_arguments, _compare),
    "export": Command("a cache as a Parquet file, for other tools", _export_arguments, _export),
    "import": Command("soft targets of other stacks into a cache", _import_arguments, _import),
    "estimate": Command("size and hours of a cache before it is written", _estimate_arguments, _estimate),
}
