"""Documents of a corpus, in a fixed order, each belonging to the training or the held-out split.

The split is drawn by a hash of the text (standard library: of the file's name; where there are pictures: of these), so
equal texts fall on the same side and no order, addition or removal of other documents moves one across.
"""

from __future__ import annotations

import glob
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import xxhash

from distill.config.errors import DataError
from distill.config.paths import home
from distill.config.schema import IMAGE_TOKENS, CorpusConfig, Source
from distill.data import digits, needle
from distill.data.tables import READERS, rows, suffix

Ranges = list[tuple[int, int]]
"""[start, end) characters of a text."""

NO_SOURCE = {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}
"""Folders of the standard library that are left out: tests, and what is not the standard library."""


MARKER = "<|image|>"
"""Stands in a text where a picture belongs."""


class MissingFiles(DataError):
    """The files that a configuration names are not there; what was packed from them may be."""


class Picture(NamedTuple):
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
    pictures: tuple[Picture, ...] = ()
    """One for each MARKER of the text, in order."""


@dataclass(frozen=True)
class _File:
    path: Path
    name: str
    """What orders, splits and identifies it."""
    held_out: bool | None
    """None: decided document by document."""


class Corpus:
    """The documents that one `CorpusConfig` names.

    Raises:
        MissingFiles: no file matches.
        DataError: one is named for both splits.
    """

    def __init__(self, name: str, config: CorpusConfig):
        self.name, self.config = name, config
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
        if c.has_pictures:
            digest.update(repr((c.image_key, digits.DRAWING)).encode())
        if c.source is Source.needle:
            digest.update(repr((needle.FORMAT, c.needle)).encode())
        for file in self._files:
            try:
                stat = file.path.stat()
            except OSError as error:
                raise DataError(f"{file.path}: cannot be read: {error.strerror}") from error
            digest.update(repr((file.name, file.held_out, stat.st_size, stat.st_mtime_ns)).encode())
        return digest.hexdigest()

    @property
    def has_held_out(self) -> bool:
        return self.config.held_out > 0 or bool(self.config.held_out_files)

    def documents(self, scratch: Path) -> Iterator[Document]:
        """Every document that has text, in order; `scratch` is a folder for the readers' own files.

        Raises:
            DataError: a file or a document that cannot be read as configured; names file, key and value.
        """
        if self.config.source is Source.digits:
            yield from self._digits()
        if self.config.source is Source.needle:
            yield from self._made_up()
        # The limit holds for `files` and `held_out_files` each; the standard library's files are limited already.
        left = dict.fromkeys((True, False, None), self.config.max_documents)
        for file in self._files:
            limit = left[file.held_out]
            if limit == 0:
                continue
            for read, document in enumerate(self._read(file, scratch), 1):
                if document.text:
                    yield document
                if limit is not None:
                    left[file.held_out] = limit - read
                    if read == limit:
                        break

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
        return [_File(root / name, name, self._share(name)) for name in sorted(names)[: self.config.max_documents]]

    def _named(self) -> list[_File]:
        held_out = self._match("held_out_files", self.config.held_out_files)
        files = self._match("files", self.config.files)
        if both := [str(path) for path in files if path in set(held_out)]:
            raise DataError(f"{self.key}: {', '.join(both)} is in files and in held_out_files; it must be in one")
        rest = False if held_out else None
        return [_File(p, str(p), rest) for p in files] + [_File(p, str(p), True) for p in held_out]

    def _match(self, key: str, patterns: list[str]) -> list[Path]:
        """Files in the order of the patterns, sorted within each, none twice."""
        found: dict[Path, None] = {}
        for pattern in patterns:
            pattern = home(pattern)
            names = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(_literal(pattern), recursive=True))
            paths = [Path(name).resolve() for name in names if os.path.isfile(name)]
            if not paths:
                raise MissingFiles(f"{self.key}.{key} has {pattern!r}; no file matches (working folder: {os.getcwd()})")
            found.update(dict.fromkeys(paths))
        return list(found)

    # ------------------------------------------------------------ documents

    def _digits(self) -> Iterator[Document]:
        for number, digit in enumerate(digits.read(self.config.max_documents), 1):
            held_out = self._share(digit.original)
            ranges = None
            if held_out:
                if digit.answer is None:
                    continue
                ranges = [digit.answer]  # nothing else counts: accuracy is then that of reading the digit
            yield Document(digit.text, ranges, held_out, (Picture(digit.picture, f"document {number} of digits"),))

    def _made_up(self) -> Iterator[Document]:
        c = self.config
        for index in range(c.max_documents or 0):
            text, answers = needle.document(c.needle, index)
            yield Document(text, answers if c.needle.answers_only else None, self._share(text))

    def _read(self, file: _File, scratch: Path) -> Iterator[Document]:
        if suffix(file.path) in READERS:
            yield from self._rows(file, scratch)
            return
        for key in ("mask_key", "image_key"):
            if (column := getattr(self.config, key)) is not None:
                raise DataError(f"{self.key}.{key} is {column!r}; {file.path} is text and has no columns")
        text = _read_text(file.path, source_code=self.config.source is Source.stdlib)
        yield Document(text, None, self._share(text) if file.held_out is None else file.held_out)

    def _rows(self, file: _File, scratch: Path) -> Iterator[Document]:
        c = self.config
        keys = {key: column for key in ("text_key", "mask_key", "image_key") if (column := getattr(c, key)) is not None}
        names = [f"{self.key}.{key}" for key in keys]
        for number, row in enumerate(rows(file.path, list(keys.values()), names, scratch), 1):
            where, values = f"{file.path}, row {number}", dict(zip(keys, row))
            text = values["text_key"]
            if not isinstance(text, str):
                raise DataError(f"{where}: column {c.text_key!r} is {_short(text)}; a text is needed")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise DataError(f"{where}: column {c.text_key!r} is not valid Unicode: {error.reason}") from error
            ranges: Ranges | None = None
            pictures: tuple[Picture, ...] = ()
            if c.mask_key is not None:
                ranges = _ranges(values["mask_key"], len(text), f"{where}: column {c.mask_key!r}")
            if c.image_key is not None:
                pictures = _pictures(values["image_key"], file.path.parent, f"{where}: column {c.image_key!r}")
                _marked(text, len(pictures), f"{where}: column {c.text_key!r}")
            held_out = file.held_out
            if held_out is None:
                held_out = self._share(b"".join(picture.data for picture in pictures) or text)
            yield Document(text, ranges, held_out, pictures)

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


def _read_text(path: Path, source_code: bool) -> str:
    try:
        if source_code:  # honours a coding line
            with tokenize.open(path) as file:
                return file.read()
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, SyntaxError) as error:
        raise DataError(f"{path}: not text in UTF-8: {error}; allowed: {', '.join(READERS)}, or text") from error
    if "\0" in text:
        raise DataError(f"{path}: not text: it holds NUL; allowed: {', '.join(READERS)}, or text")
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


def _pictures(value: object, folder: Path, where: str) -> tuple[Picture, ...]:
    """The files of a row's picture or pictures; None is none."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(
        Picture(_file(value, folder, where), f"{where}, picture {number}") for number, value in enumerate(values, 1)
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


def _marked(text: str, pictures: int, where: str) -> None:
    if (marks := text.count(MARKER)) != pictures:
        raise DataError(f"{where} has {MARKER} {marks} times, its row has {pictures} pictures; as many are needed")
    if foreign := [token for token in IMAGE_TOKENS if token != MARKER and token in text]:
        raise DataError(f"{where} has {', '.join(foreign)}; beside {MARKER} the tokens of a picture come from packing")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
