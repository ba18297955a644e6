"""The files of a corpus: found by the names that its configuration gives, each with its kind and its split."""

import filecmp
import glob
import os
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from distill.config.errors import DataError
from distill.config.paths import home
from distill.config.schema import CorpusConfig, FileFormat, Source
from distill.data.formats import ALLOWED, Kind, kind_of

NO_SOURCE = {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}
"""Folders of the standard library that are left out: tests, and what is not the standard library."""


class MissingFiles(DataError):
    """The files that a configuration names do not exist; what was packed from them may."""


@dataclass(frozen=True)
class CorpusFile:
    path: Path
    name: str
    """Decides the file's place in the order, its split and its part of the corpus's identity."""
    kind: Kind
    held_out: bool | None
    """None: decided document by document."""


def is_held_out(identity: str | bytes, share: float) -> bool:
    """True for this share of all identities, drawn by their hash."""
    data = identity.encode() if isinstance(identity, str) else identity
    return xxhash.xxh3_64_intdigest(data) < share * 2**64


def find_files(key: str, config: CorpusConfig) -> list[CorpusFile]:
    """The files of a corpus, in order; none where the corpus has no files.

    Args:
        key: the configuration's name for the corpus.

    Raises:
        MissingFiles: no file matches.
        DataError: a file's name does not say what it holds, or it is named for both splits.
    """
    if config.source is Source.stdlib:
        return _standard_library(key, config)
    if config.source is not Source.files:
        return []
    problems: list[DataError] = []
    held_out = _match(f"{key}.held_out_files", config.held_out_files, config.format, problems)
    files = _match(f"{key}.files", config.files, config.format, problems)
    for path, twin in _in_both(files, held_out):
        name = "" if path == twin else f" as {twin}"
        problems.append(DataError(f"{key}: {path} is in files and in held_out_files{name}; it must be in one"))
    if problems:
        missing = all(isinstance(problem, MissingFiles) for problem in problems)
        raise (MissingFiles if missing else DataError)("\n".join(map(str, problems)))
    rest = False if held_out else None
    return [
        CorpusFile(path, str(path), kind, split)
        for split, part in ((rest, files), (True, held_out))
        for path, kind in part.items()
    ]


def _standard_library(key: str, config: CorpusConfig) -> list[CorpusFile]:
    root = Path(sysconfig.get_path("stdlib"))
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in NO_SOURCE]
        # _sysconfigdata is written when Python is built and names folders of that machine.
        sources = (f for f in files if f.endswith(".py") and not f.startswith("_sysconfigdata"))
        names += [(Path(folder) / f).relative_to(root).as_posix() for f in sources]
    if not names:
        raise MissingFiles(f"{key}.source is stdlib; {root} holds no source files: use source=files")
    kind = Kind(FileFormat.text, None)
    names = sorted(names)[: config.max_documents]
    return [CorpusFile(root / name, name, kind, is_held_out(name, config.held_out)) for name in names]


def _match(key: str, patterns: list[str], given: FileFormat | None, problems: list[DataError]) -> dict[Path, Kind]:
    """Files in the order of the patterns, sorted within each, none twice; `problems` is added to."""
    kinds: dict[Path, Kind] = {}
    unknown: list[str] = []
    for pattern in map(home, patterns):
        names = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(_literal(pattern), recursive=True))
        names = [name for name in names if os.path.isfile(name)]
        if not names and os.path.isdir(pattern):
            files = os.path.join(pattern, "**", "*.jsonl")
            problems.append(DataError(f"{key} has {pattern!r}; it is a folder: name its files, {files!r} or the like"))
        elif not names:
            problems.append(MissingFiles(f"{key} has {pattern!r}; no file matches (working folder: {os.getcwd()})"))
        for name in names:
            path = Path(name).resolve()
            # Of a link and its target the link has the better name: the target may be named by a digest.
            kind = kind_of(Path(name), given) or kind_of(path)
            if kind is None:
                unknown.append(name)
            else:
                kinds.setdefault(path, kind)
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        problems.append(
            DataError(
                f"{key} has {', '.join(unknown[:3])}{more}, whose suffix names no format; allowed: "
                f"{ALLOWED}; rename, narrow the pattern, or set {key.rpartition('.')[0]}.format (text, json, parquet, "
                "arrow)"
            )
        )
    return kinds


def _literal(pattern: str) -> str:
    """The glob in which leading folders that exist under exactly their name are taken literally."""
    start, rest = Path(), list(Path(pattern).parts)
    while len(rest) > 1 and (start / rest[0]).is_dir():
        start /= rest.pop(0)
    return os.path.join(glob.escape(str(start)), *rest) if start.parts else pattern


def _in_both(files: dict[Path, Kind], held_out: dict[Path, Kind]) -> Iterator[tuple[Path, Path]]:
    """Each file that is held out as well, under this name, another one or as a copy, and the held-out one.

    Copies of texts are allowed: they may be alike, as a license in each folder is.
    """
    inodes: dict[tuple[int, int], Path] = {}
    sizes: dict[int, list[Path]] = defaultdict(list)
    for path, kind in held_out.items():
        stat = path.stat()
        inodes[stat.st_dev, stat.st_ino] = path
        if stat.st_size and kind.format is not FileFormat.text:
            sizes[stat.st_size].append(path)
    for path, kind in files.items():
        stat = path.stat()
        twin = inodes.get((stat.st_dev, stat.st_ino))
        if twin is None and kind.format is not FileFormat.text:
            twin = next((other for other in sizes[stat.st_size] if filecmp.cmp(path, other, shallow=False)), None)
        if twin is not None:
            yield path, twin
