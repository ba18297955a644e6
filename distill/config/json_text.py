"""JSON as other programs read it: a number that is not finite has no spelling there."""

import json
import math
from typing import Any


def dumps(data: Any, *, indent: int | None = None) -> str:
    """JSON text of what was measured; a NaN or an infinity becomes null, at any depth."""
    return json.dumps(_plain(data), indent=indent, allow_nan=False)


def _plain(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    return data
