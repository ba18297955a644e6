"""Documents of a corpus, in a fixed order, each of the training or the held-out split.

The split is drawn by a hash of the text (standard library: of the file's name; where there are images: of the images).
Equal texts thus fall on the same side, and no order, addition or removal of other documents moves one across.
"""

import contextlib
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import xxhash

from distill.config.errors import DataError
from distill.config.schema import IMAGE_TOKENS, CorpusConfig, FileFormat, Source
from distill.data import digits, needle
from distill.data.corpus_files import CorpusFile, find_files, is_held_out
from distill.data.formats import ALLOWED, READ_ERRORS, compression_of, kind_of, opened, problem
from distill.data.law import FORMAT as LAW_FORMAT
from distill.data.law import Law
from distill.data.tables import rows
from distill.data.tokenizer import Ranges

MARKER = "<|image|>"
"""The place of an image in a text."""


class ImageFile(NamedTuple):
    data: bytes
    where: str
    """The name of the image in messages."""


@dataclass(frozen=True)
class Document:
    text: str
    """Never empty; whole in UTF-8."""
    ranges: Ranges | None
    """Characters that carry loss; None: all."""
    held_out: bool
    images: tuple[ImageFile, ...] = ()
    """One for each MARKER of the text, in order."""


class RawCorpus:
    """The documents that one `CorpusConfig` names.

    Attributes:
        empty: documents without text that the last walk over `documents` left out.
        share: share of the files' bytes that the walk has read; None: not known.

    Raises:
        MissingFiles: no file matches.
        DataError: a file is named for both splits, or its name does not say what it holds.
    """

    def __init__(self, name: str, config: CorpusConfig):
        self.name, self.config, self.key = name, config, f"data.corpora.{name}"
        self.empty = 0
        self.share: float | None = None
        self._files = find_files(self.key, config)

    @property
    def identity(self) -> str:
        """Hex digest of what decides the documents: names, sizes and times of the files, and the configuration.

        Texts are not read for it, so that a finished packing is found without the time that packing takes.
        """
        c, digest = self.config, xxhash.xxh3_128()
        digest.update(repr((c.source.value, c.text_key, c.mask_key, c.held_out, c.max_documents)).encode())
        if c.has_images:
            digest.update(repr((c.image_key, digits.DRAWING)).encode())
        if c.source is Source.needle:
            digest.update(repr((needle.FORMAT, c.needle)).encode())
        if c.source is Source.law:
            digest.update(repr((LAW_FORMAT, c.law)).encode())
        for file in self._files:
            try:
                stat = file.path.stat()
            except OSError as error:
                raise DataError(f"{file.path}: cannot be read: {error.strerror}") from error
            digest.update(repr((file.name, file.held_out, stat.st_size, stat.st_mtime_ns)).encode())
            if file.kind != kind_of(file.path) or file.path.suffix != file.path.suffix.lower():
                digest.update(repr(file.kind).encode())  # what was packed before may have been read as text
        return digest.hexdigest()

    def documents(self, scratch: Path) -> Iterator[Document]:
        """Every document that has text, in order; `scratch` is a folder for the readers' own files.

        Raises:
            DataError: a file or a document that cannot be read as configured; names file, key and value.
        """
        self.empty, self.share = 0, None
        if self.config.source is Source.digits:
            yield from self._digits()
        if self.config.source is Source.needle:
            yield from self._needle()
        if self.config.source is Source.law:
            for text in Law(self.config.law).documents(self.config.max_documents or 0):
                yield Document(text, None, is_held_out(text, self.config.held_out))
        # The limit holds for `files` and `held_out_files` each; the standard library's files are limited already.
        left = dict.fromkeys((True, False, None), self.config.max_documents)
        sizes = (file.path.stat().st_size if file.path.exists() else 0 for file in self._files)
        starts = list(accumulate(sizes, initial=0))
        for file, start, end in zip(self._files, starts, starts[1:]):
            limit = left[file.held_out]
            if limit == 0:
                continue

            def progress(share: float, start: int = start, end: int = end) -> None:
                if starts[-1] and self.config.max_documents is None:
                    self.share = (start + share * (end - start)) / starts[-1]

            progress(0.0)
            for count, document in enumerate(self._file(file, scratch, progress), 1):
                if document.text:
                    yield document
                else:
                    self.empty += 1
                if limit is not None:
                    left[file.held_out] = limit - count
                    if count == limit:
                        break

    def _digits(self) -> Iterator[Document]:
        for number, digit in enumerate(digits.read(self.config.max_documents), 1):
            held_out = is_held_out(digit.original, self.config.held_out)
            if held_out and digit.answer is None:
                continue
            # Of a held-out document the answer alone carries loss, so that accuracy is that of reading the digit.
            ranges = [digit.answer] if held_out and digit.answer else None
            yield Document(digit.text, ranges, held_out, (ImageFile(digit.image, f"document {number} of digits"),))

    def _needle(self) -> Iterator[Document]:
        c = self.config
        for index in range(c.max_documents or 0):
            text, answers = needle.document(c.needle, index)
            yield Document(text, answers if c.needle.answers_only else None, is_held_out(text, c.held_out))

    def _file(self, file: CorpusFile, scratch: Path, progress: Callable[[float], None]) -> Iterator[Document]:
        if file.kind.format is not FileFormat.text:
            yield from self._rows(file, scratch, progress)
            return
        for key in ("mask_key", "image_key"):
            if (column := getattr(self.config, key)) is not None:
                raise DataError(f"{self.key}.{key} is {column!r}; {file.path} is text and has no columns")
        text = _read_text(file, source_code=self.config.source is Source.stdlib)
        yield Document(text, None, self._held_out(file, text))

    def _rows(self, file: CorpusFile, scratch: Path, progress: Callable[[float], None]) -> Iterator[Document]:
        c = self.config
        keys = {"text_key": c.text_key, "mask_key": c.mask_key, "image_key": c.image_key}
        columns = {column: f"{self.key}.{key}" for key, column in keys.items() if column is not None}
        for number, row in rows(file.path, file.kind, columns, scratch, progress):
            where = {column: f"{file.path}, row {number}: column {column!r}" for column in columns}
            text = _text(row.get(c.text_key), where[c.text_key])
            ranges: Ranges | None = None
            images: tuple[ImageFile, ...] = ()
            if c.mask_key is not None:
                ranges = _ranges(row.get(c.mask_key), len(text), where[c.mask_key])
            if c.image_key is not None:
                images = _images(row.get(c.image_key), file.path.parent, where[c.image_key])
                _check_markers(text, len(images), where[c.text_key])
            identity = b"".join(image.data for image in images) or text
            yield Document(text, ranges, self._held_out(file, identity), images)

    def _held_out(self, file: CorpusFile, identity: str | bytes) -> bool:
        return is_held_out(identity, self.config.held_out) if file.held_out is None else file.held_out


def _read_text(file: CorpusFile, source_code: bool) -> str:
    path = file.path
    try:
        if source_code:  # with a coding line
            with tokenize.open(path) as source:
                return source.read()
        compression = compression_of(path, file.kind)
        if compression is None or path.stat().st_size == 0:
            data = path.read_bytes()
        else:
            with path.open("rb") as packed, opened(packed, compression) as unpacked:
                data = unpacked.read()
        text = data.decode("utf-8-sig")
    except (UnicodeDecodeError, SyntaxError) as error:
        raise DataError(f"{path}: not text in UTF-8: {error}; allowed: {ALLOWED}") from error
    except READ_ERRORS as error:
        raise DataError(f"{path}: cannot be read: {problem(error)}") from error
    if "\0" in text:
        raise DataError(f"{path}: not text: it holds NUL; allowed: {ALLOWED}")
    return text


def _text(value: object, where: str) -> str:
    if isinstance(value, bytes):  # some writers of Parquet do not mark text as such
        with contextlib.suppress(UnicodeDecodeError):
            value = value.decode()
    if not isinstance(value, str):
        raise DataError(f"{where} is {_short(value)}; a text is needed")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where} is not valid Unicode: {error.reason}") from error
    return value


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
    """The files of a row's image or images; none for None."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(
        ImageFile(_image_bytes(value, folder, where), f"{where}, image {number}")
        for number, value in enumerate(values, 1)
    )


def _image_bytes(value: object, folder: Path, where: str) -> bytes:
    if isinstance(value, dict):  # of the library `datasets`: the bytes, or else a path
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise DataError(f"{where} has {_short(value)}; a path, bytes, a dict of both, or a list of these is needed")
    path = folder / value
    if "\0" in value or not path.is_file():  # a device or a pipe might never end
        raise DataError(f"{where} has {_short(value)}; {path} is no file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{where} has {_short(value)}; {path} cannot be read: {error.strerror}") from error


def _check_markers(text: str, images: int, where: str) -> None:
    if (markers := text.count(MARKER)) != images:
        raise DataError(f"{where} has {MARKER} {markers} times, its row has {images} images; as many are needed")
    if foreign := [token for token in IMAGE_TOKENS if token != MARKER and token in text]:
        raise DataError(f"{where} has {', '.join(foreign)}; beside {MARKER} the tokens of an image come from packing")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
