"""Objects of a JSON file, one after the other: on lines, or spread over them, or in one array; read as a stream."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

BLOCK = 1 << 20
"""Bytes read at a time; more for a value that is longer."""
NEAR = 16
"""Characters from the end of what was read: a word, number or escape that is cut there fails within them."""
_SPACE = re.compile("[ \t\n\r\ufeff]*")
"""A byte order mark may stand before any value: files are joined with `cat`."""


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} more than once")
    return found


class JsonRows:
    """Iterates over the objects of one file; strings stay what they are, whatever they look like.

    Args:
        read: returns the next bytes, at most so many; none at the end.

    Attributes:
        row: where reading is: the line on which an object begins or, within an array, the object's number; from 1.

    Raises:
        ValueError: what stands at `row` is no JSON object in UTF-8; and whatever `read` raises.
    """

    def __init__(self, read: Callable[[int], bytes]):
        self._read = read
        self._bytes = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder(object_pairs_hook=_no_twins)
        self._text, self._at = "", 0
        self._line, self._count, self._array = 1, 0, False
        self._ended = False
        self._fault: UnicodeDecodeError | None = None
        """What follows the text that was read so far."""

    @property
    def row(self) -> int:
        return self._count + 1 if self._array else self._line

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        if self._peek() == "[":
            self._array = True
            self._to(self._at + 1)
        while (mark := self._peek()) != "":
            if self._array:
                if mark == "]":
                    self._to(self._at + 1)
                    if self._peek() != "":
                        raise ValueError(f"{self._near(self._at)} after the end of the array")
                    return
                if self._count:
                    if mark != ",":
                        raise ValueError(f"Expecting ',' at {self._near(self._at)}")
                    self._to(self._at + 1)
                    self._peek()
            value, end = self._value()
            if not isinstance(value, dict):
                raise ValueError(f"{self._near(self._at)} is no object")
            row = self.row
            self._to(end)
            self._count += 1
            yield row, value
        if self._array:
            raise ValueError("the array has no end")

    def _value(self) -> tuple[Any, int]:
        """The value here and where it ends, reading on as long as it may merely be cut."""
        while True:
            try:
                return self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.pos + NEAR > len(self._text) or error.msg.startswith("Unterminated string")
                if not (cut and self._more()):
                    raise ValueError(f"{error.msg.removesuffix(' at')} at {self._near(error.pos)}") from error

    def _peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            assert found is not None  # the pattern takes nothing, too
            self._to(found.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _more(self) -> bool:
        """Reads on; False at the end."""
        if self._fault is not None:
            byte = self._fault.object[self._fault.start]
            raise ValueError(f"byte 0x{byte:02X} is not utf-8 ({self._fault.reason})")
        if self._ended:
            return False
        waiting = self._text[self._at :]
        data = self._read(max(BLOCK, len(waiting)))
        self._ended = not data
        try:
            new = self._bytes.decode(data, final=self._ended)
        except UnicodeDecodeError as fault:  # it belongs to a later row than some of what is before it
            self._fault = fault
            new = fault.object[: fault.start].decode()
        self._text, self._at = waiting + new, 0
        return True

    def _to(self, place: int) -> None:
        self._line += self._text.count("\n", self._at, place)
        self._at = place

    def _near(self, place: int) -> str:
        return repr(self._text[place : place + 20]) if place < len(self._text) else "the end of the file"
