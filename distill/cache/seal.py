"""JSON that carries its own digest: `{..., "digest": "<xxh3-64 of every byte before this key>"}`.

The digest is over bytes, not over parsed values, so that no flipped bit can go unnoticed.
"""

import json
from typing import Any

import xxhash


def digest(data: bytes | memoryview) -> str:
    """xxh3-64 as 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)


def seal(record: dict[str, Any], indent: int | None = None) -> bytes:
    """A sealed JSON object and a newline, on a single line unless `indent` is given; NaN is not allowed."""
    text = json.dumps(record, indent=indent, allow_nan=False)
    body = text.removesuffix("}").rstrip().encode() + (b", " if indent is None else b",\n" + b" " * indent)
    return body + _end(body)


def unseal(data: bytes) -> dict[str, Any]:
    """The record without its digest; ValueError when any byte differs from what was sealed."""
    body = data[: data.rfind(b'"digest"')]
    if data[len(body) :] != _end(body):
        raise ValueError("its digest does not verify")
    record = json.loads(body.rstrip(b", \n") + b"}")
    if not isinstance(record, dict):
        raise ValueError("it is not an object")
    return record


def _end(body: bytes) -> bytes:
    return f'"digest": "{digest(body)}"}}\n'.encode()
