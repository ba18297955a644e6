"""Objects of a JSON file, one after the other: on lines, or spread over them, or in one array; read as a stream."""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

BLOCK = 1 << 20
"""Bytes read at a time; more for a value that is longer."""
NEAR = 16
"""Characters before the end of a block within which a word, number or escape that is cut by it fails to parse."""
_SPACE = re.compile("[ \t\n\r\ufeff]*")
"""A byte order mark may stand before any value, since files are joined with `cat`."""


class JsonRows:
    """Iterates over the objects of one file and their rows; strings are never taken for dates or numbers.

    Args:
        read: returns the next bytes, at most so many; none at the end.

    Attributes:
        row: of the object that is read now: the line on which it begins or, within an array, its number; from 1.

    Raises:
        ValueError: no JSON object in UTF-8 at `row`, or a key more than once; and whatever `read` raises.
    """

    def __init__(self, read: Callable[[int], bytes]):
        self._read = read
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder(object_pairs_hook=_unique)
        self._text, self._place = "", 0
        self._line, self._count, self._array = 1, 0, False
        self._ended = False
        self._fault: UnicodeDecodeError | None = None
        """The error of the bytes that follow `_text`, which belong to a later row than some of it."""

    @property
    def row(self) -> int:
        return self._count + 1 if self._array else self._line

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        if self._peek() == "[":
            self._array = True
            self._advance(self._place + 1)
        while (mark := self._peek()) != "":
            if self._array:
                if mark == "]":
                    self._advance(self._place + 1)
                    if self._peek() != "":
                        raise ValueError(f"{self._quote(self._place)} after the end of the array")
                    return
                if self._count:
                    if mark != ",":
                        raise ValueError(f"Expecting ',' at {self._quote(self._place)}")
                    self._advance(self._place + 1)
                    self._peek()
            value, end = self._value()
            if not isinstance(value, dict):
                raise ValueError(f"{self._quote(self._place)} is no object")
            row = self.row
            self._advance(end)
            self._count += 1
            yield row, value
        if self._array:
            raise ValueError("the array has no end")

    def _value(self) -> tuple[Any, int]:
        """The value at this place and its end; reads on as long as the value may merely be cut."""
        while True:
            try:
                return self._json.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                cut = error.pos + NEAR > len(self._text) or error.msg.startswith("Unterminated string")
                if not (cut and self._read_on()):
                    raise ValueError(f"{error.msg.removesuffix(' at')} at {self._quote(error.pos)}") from error

    def _peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            spaces = _SPACE.match(self._text, self._place)
            assert spaces is not None  # the pattern also matches nothing
            self._advance(spaces.end())
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._read_on():
                return ""

    def _read_on(self) -> bool:
        """Takes the next block; False at the end of the file."""
        if self._fault is not None:
            byte = self._fault.object[self._fault.start]
            raise ValueError(f"byte 0x{byte:02X} is not utf-8 ({self._fault.reason})")
        if self._ended:
            return False
        rest = self._text[self._place :]
        data = self._read(max(BLOCK, len(rest)))
        self._ended = not data
        try:
            new = self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as fault:
            self._fault = fault
            new = fault.object[: fault.start].decode()
        self._text, self._place = rest + new, 0
        return True

    def _advance(self, place: int) -> None:
        self._line += self._text.count("\n", self._place, place)
        self._place = place

    def _quote(self, place: int) -> str:
        return repr(self._text[place : place + 20]) if place < len(self._text) else "the end of the file"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} more than once")
    return value
