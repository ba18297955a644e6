"""Documents of a corpus, in a fixed order, each belonging to the training or the held-out split.

The split is drawn by a hash of the text (standard library: of the file's name; where there are images: of these), so
equal texts fall on the same side and no order, addition or removal of other documents moves one across.
"""

from __future__ import annotations

import contextlib
import filecmp
import glob
import os
import sysconfig
import tokenize
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import xxhash

from distill.config.errors import DataError
from distill.config.paths import home
from distill.config.schema import IMAGE_TOKENS, CorpusConfig, FileFormat, Source
from distill.data import digits, needle
from distill.data.formats import ALLOWED, READ_ERRORS, Kind, compression_of, kind_of, opened, reason
from distill.data.tables import rows

Ranges = list[tuple[int, int]]
"""[start, end) characters of a text."""

NO_SOURCE = {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}
"""Folders of the standard library that are left out: tests, and what is not the standard library."""


MARKER = "<|image|>"
"""Stands in a text where an image belongs."""


class MissingFiles(DataError):
    """The files that a configuration names are not there; what was packed from them may be."""


class ImageFile(NamedTuple):
    data: bytes
    """Of its file."""
    where: str
    """What messages call it."""


@dataclass(frozen=True)
class Document:
    text: str
    """Never empty; whole in UTF-8."""
    ranges: Ranges | None
    """Characters that carry loss; None: all."""
    held_out: bool
    images: tuple[ImageFile, ...] = ()
    """One for each MARKER of the text, in order."""


@dataclass(frozen=True)
class _File:
    path: Path
    name: str
    """What orders, splits and identifies it."""
    kind: Kind
    held_out: bool | None
    """None: decided document by document."""


class Corpus:
    """The documents that one `CorpusConfig` names.

    Attributes:
        empty: documents without text that the last walk over `documents` left out.
        share: of the files' bytes that it has read; None: not known.

    Raises:
        MissingFiles: no file matches.
        DataError: one is named for both splits.
    """

    def __init__(self, name: str, config: CorpusConfig):
        self.name, self.config = name, config
        self.empty = 0
        self.share: float | None = None
        self.key = f"data.corpora.{name}"
        find = {Source.stdlib: self._stdlib, Source.files: self._named}
        # The other sources make their documents up, without files.
        self._files: list[_File] = find[config.source]() if config.source in find else []

    @property
    def identity(self) -> str:
        """Hex digest of what decides the documents: names, sizes and times of the files, and the configuration.

        Texts are not read for it: that a finished packing is found must not take as long as packing.
        """
        c, digest = self.config, xxhash.xxh3_128()
        digest.update(repr((c.source.value, c.text_key, c.mask_key, c.held_out, c.max_documents)).encode())
        if c.has_images:
            digest.update(repr((c.image_key, digits.DRAWING)).encode())
        if c.source is Source.needle:
            digest.update(repr((needle.FORMAT, c.needle)).encode())
        for file in self._files:
            try:
                stat = file.path.stat()
            except OSError as error:
                raise DataError(f"{file.path}: cannot be read: {error.strerror}") from error
            digest.update(repr((file.name, file.held_out, stat.st_size, stat.st_mtime_ns)).encode())
            if file.kind != kind_of(file.path) or file.path.suffix != file.path.suffix.lower():
                digest.update(repr(file.kind).encode())  # what was packed before may have been read as text
        return digest.hexdigest()

    @property
    def has_held_out(self) -> bool:
        return self.config.held_out > 0 or bool(self.config.held_out_files)

    def documents(self, scratch: Path) -> Iterator[Document]:
        """Every document that has text, in order; `scratch` is a folder for the readers' own files.

        Raises:
            DataError: a file or a document that cannot be read as configured; names file, key and value.
        """
        self.empty = 0
        if self.config.source is Source.digits:
            yield from self._digits()
        if self.config.source is Source.needle:
            yield from self._made_up()
        # The limit holds for `files` and `held_out_files` each; the standard library's files are limited already.
        left = dict.fromkeys((True, False, None), self.config.max_documents)
        ends = list(accumulate(file.path.stat().st_size if file.path.exists() else 0 for file in self._files))
        for file, start, end in zip(self._files, [0, *ends], ends):
            limit = left[file.held_out]
            if limit == 0:
                continue
            at = partial(self._at, start, end, ends[-1])
            at(0.0)
            for read, document in enumerate(self._read(file, scratch, at), 1):
                if document.text:
                    yield document
                else:
                    self.empty += 1
                if limit is not None:
                    left[file.held_out] = limit - read
                    if read == limit:
                        break

    def _at(self, start: int, end: int, total: int, share: float) -> None:
        """Notes that of the bytes from start to end, which are a file's, so many were read."""
        known = total > 0 and self.config.max_documents is None
        self.share = (start + share * (end - start)) / total if known else None

    # ------------------------------------------------------------ files

    def _stdlib(self) -> list[_File]:
        root = Path(sysconfig.get_path("stdlib"))
        names = []
        for folder, folders, files in os.walk(root):
            folders[:] = [f for f in folders if f not in NO_SOURCE]
            # _sysconfigdata is written when Python is built: it says where, and differs on every machine.
            found = (f for f in files if f.endswith(".py") and not f.startswith("_sysconfigdata"))
            names += [(Path(folder) / f).relative_to(root).as_posix() for f in found]
        if not names:
            raise MissingFiles(f"{self.key}.source is stdlib; {root} holds no source files: use source=files")
        kind = Kind(FileFormat.text, None)
        names = sorted(names)[: self.config.max_documents]
        return [_File(root / name, name, kind, self._share(name)) for name in names]

    def _named(self) -> list[_File]:
        problems: list[DataError] = []
        held_out = self._match("held_out_files", self.config.held_out_files, problems)
        files = self._match("files", self.config.files, problems)
        twins = _Twins(held_out)
        both = [(path, twin) for path, kind in files.items() if (twin := twins.of(path, kind)) is not None]
        for path, twin in both:
            name = "" if path == twin else f" as {twin}"
            problems.append(DataError(f"{self.key}: {path} is in files and in held_out_files{name}; it must be in one"))
        if problems:
            gone = all(isinstance(problem, MissingFiles) for problem in problems)
            raise (MissingFiles if gone else DataError)("\n".join(map(str, problems)))
        rest = False if held_out else None
        return [_File(p, str(p), kind, rest) for p, kind in files.items()] + [
            _File(p, str(p), kind, True) for p, kind in held_out.items()
        ]

    def _match(self, key: str, patterns: list[str], problems: list[DataError]) -> dict[Path, Kind]:
        """Files in the order of the patterns, sorted within each, none twice; what is wrong goes into `problems`."""
        found: dict[Path, Kind] = {}
        unknown: list[str] = []
        for pattern in patterns:
            pattern = home(pattern)
            names = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(_literal(pattern), recursive=True))
            names = [name for name in names if os.path.isfile(name)]
            if not names:
                has = f"{self.key}.{key} has {pattern!r}"
                if os.path.isdir(pattern):
                    all_in_it = os.path.join(pattern, "**", "*.jsonl")
                    problems.append(DataError(f"{has}; it is a folder: name its files, {all_in_it!r} or the like"))
                else:
                    problems.append(MissingFiles(f"{has}; no file matches (working folder: {os.getcwd()})"))
            for name in names:
                path = Path(name).resolve()
                # A link has the better name: what it leads to may be called by a digest.
                kind = kind_of(Path(name), self.config.format) or kind_of(path)
                if kind is None:
                    unknown.append(name)
                else:
                    found.setdefault(path, kind)
        if unknown:
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            problem = (
                f"{self.key}.{key} has {', '.join(unknown[:3])}{more}, whose suffix does not say what is in it; "
                f"allowed: {ALLOWED}; rename, narrow the pattern, or set {self.key}.format (text, json, parquet, arrow)"
            )
            problems.append(DataError(problem))
        return found

    # ------------------------------------------------------------ documents

    def _digits(self) -> Iterator[Document]:
        for number, digit in enumerate(digits.read(self.config.max_documents), 1):
            held_out = self._share(digit.original)
            ranges = None
            if held_out:
                if digit.answer is None:
                    continue
                ranges = [digit.answer]  # nothing else counts: accuracy is then that of reading the digit
            yield Document(digit.text, ranges, held_out, (ImageFile(digit.image, f"document {number} of digits"),))

    def _made_up(self) -> Iterator[Document]:
        c = self.config
        for index in range(c.max_documents or 0):
            text, answers = needle.document(c.needle, index)
            yield Document(text, answers if c.needle.answers_only else None, self._share(text))

    def _read(self, file: _File, scratch: Path, at: Callable[[float], None]) -> Iterator[Document]:
        if file.kind.format is not FileFormat.text:
            yield from self._rows(file, scratch, at)
            return
        for key in ("mask_key", "image_key"):
            if (column := getattr(self.config, key)) is not None:
                raise DataError(f"{self.key}.{key} is {column!r}; {file.path} is text and has no columns")
        text = _read_text(file.path, file.kind, source_code=self.config.source is Source.stdlib)
        yield Document(text, None, self._share(text) if file.held_out is None else file.held_out)

    def _rows(self, file: _File, scratch: Path, at: Callable[[float], None]) -> Iterator[Document]:
        c = self.config
        keys = {key: column for key in ("text_key", "mask_key", "image_key") if (column := getattr(c, key)) is not None}
        names = [f"{self.key}.{key}" for key in keys]
        for number, row in rows(file.path, list(keys.values()), names, scratch, file.kind, at):
            where, values = f"{file.path}, row {number}", dict(zip(keys, row))
            text = _decoded(values["text_key"])
            if not isinstance(text, str):
                raise DataError(f"{where}: column {c.text_key!r} is {_short(text)}; a text is needed")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise DataError(f"{where}: column {c.text_key!r} is not valid Unicode: {error.reason}") from error
            ranges: Ranges | None = None
            images: tuple[ImageFile, ...] = ()
            if c.mask_key is not None:
                ranges = _ranges(values["mask_key"], len(text), f"{where}: column {c.mask_key!r}")
            if c.image_key is not None:
                images = _images(values["image_key"], file.path.parent, f"{where}: column {c.image_key!r}")
                _marked(text, len(images), f"{where}: column {c.text_key!r}")
            held_out = file.held_out
            if held_out is None:
                held_out = self._share(b"".join(image.data for image in images) or text)
            yield Document(text, ranges, held_out, images)

    def _share(self, identity: str | bytes) -> bool:
        """True for `held_out` of all identities, always the same ones."""
        data = identity.encode() if isinstance(identity, str) else identity
        return xxhash.xxh3_64_intdigest(data) < self.config.held_out * 2**64


def _literal(pattern: str) -> str:
    """The glob with its leading folders, as far as they are there under that very name, taken as they are spelt."""
    start, rest = Path(), list(Path(pattern).parts)
    while len(rest) > 1 and (start / rest[0]).is_dir():
        start /= rest.pop(0)
    return os.path.join(glob.escape(str(start)), *rest) if start.parts else pattern


class _Twins:
    """The held-out files, to be found by another name or as a copy: what is trained on says nothing there."""

    def __init__(self, files: dict[Path, Kind]):
        self._inodes: dict[tuple[int, int], Path] = {}
        self._sizes: dict[int, list[Path]] = defaultdict(list)
        for path, kind in files.items():
            stat = path.stat()
            self._inodes[stat.st_dev, stat.st_ino] = path
            if stat.st_size and kind.format is not FileFormat.text:  # texts may be alike: a license in each folder
                self._sizes[stat.st_size].append(path)

    def of(self, path: Path, kind: Kind) -> Path | None:
        stat = path.stat()
        if (same := self._inodes.get((stat.st_dev, stat.st_ino))) is not None:
            return same
        if kind.format is FileFormat.text:
            return None
        alike = self._sizes.get(stat.st_size, ())
        return next((twin for twin in alike if filecmp.cmp(path, twin, shallow=False)), None)


def _decoded(text: object) -> object:
    """A column of bytes is text as well: not every writer of Parquet says so."""
    if isinstance(text, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return text.decode()
    return text


def _read_text(path: Path, kind: Kind, source_code: bool) -> str:
    try:
        if source_code:  # honours a coding line
            with tokenize.open(path) as file:
                return file.read()
        compression = compression_of(path, kind)
        if compression is None or path.stat().st_size == 0:
            data = path.read_bytes()
        else:
            with path.open("rb") as packed, opened(packed, compression) as unpacked:
                data = unpacked.read()
        text = data.decode("utf-8-sig")
    except (UnicodeDecodeError, SyntaxError) as error:
        raise DataError(f"{path}: not text in UTF-8: {error}; allowed: {ALLOWED}") from error
    except READ_ERRORS as error:
        raise DataError(f"{path}: cannot be read: {reason(error)}") from error
    if "\0" in text:
        raise DataError(f"{path}: not text: it holds NUL; allowed: {ALLOWED}")
    return text


def _ranges(value: object, length: int, where: str) -> Ranges:
    need = f"a list of [start, end) with 0 <= start <= end <= {length}, the characters of the text, is needed"
    if not isinstance(value, list):
        raise DataError(f"{where} is {_short(value)}; {need}")
    for pair in value:
        right = isinstance(pair, list) and len(pair) == 2 and all(type(end) is int for end in pair)
        if not right or not 0 <= pair[0] <= pair[1] <= length:
            raise DataError(f"{where} has {_short(pair)}; {need}")
    return [(start, end) for start, end in value]


def _images(value: object, folder: Path, where: str) -> tuple[ImageFile, ...]:
    """The files of a row's image or images; None is none."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(
        ImageFile(_file(value, folder, where), f"{where}, image {number}") for number, value in enumerate(values, 1)
    )


def _file(value: object, folder: Path, where: str) -> bytes:
    if isinstance(value, dict):  # as `datasets` has it: the bytes, or else where they are
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise DataError(f"{where} has {_short(value)}; a path, bytes, a dict of both, or a list of these is needed")
    path = folder / value
    if "\0" in value or not path.is_file():  # else a device or a pipe might never end
        raise DataError(f"{where} has {_short(value)}; {path} is no file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{where} has {_short(value)}; {path} cannot be read: {error.strerror}") from error


def _marked(text: str, images: int, where: str) -> None:
    if (marks := text.count(MARKER)) != images:
        raise DataError(f"{where} has {MARKER} {marks} times, its row has {images} images; as many are needed")
    if foreign := [token for token in IMAGE_TOKENS if token != MARKER and token in text]:
        raise DataError(f"{where} has {', '.join(foreign)}; beside {MARKER} the tokens of an image come from packing")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
