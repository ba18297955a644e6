"""Read-ahead over files that never change, bounded in memory: a request to a far store costs more than its bytes.

A read that goes on where the one before it in the same file ended fetches more than it needs, each time four times as
much; any other fetches what it needs and no more. A student that reads samples in the order of their capture needs a
few requests for each shard, and random access fetches no bytes that it does not use.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

AHEAD = 4 << 20
"""Most bytes that a read fetches beyond what it needs."""
NEAR = 1 << 18
"""Most bytes that a read may leave out and still count as going on."""
KEPT = 64 << 20
"""Most bytes kept for all files together."""
FILES = 4096
"""Most files whose last place is remembered."""
_GROWTH = 4


class _Place(NamedTuple):
    """Where the last read of a file ended, and the bytes that are kept of the file."""

    read_to: int = -1
    start: int = 0
    data: bytes = b""
    ahead: int = 0


class ReadAhead:
    """Reads files by a function of the caller's; any number of threads may read."""

    def __init__(self, fetch: Callable[[str, int, int], bytes]):
        """fetch(name, start, end): bytes of a file, fewer where it ends."""
        self._fetch = fetch
        self._lock = threading.Lock()
        self._places: OrderedDict[str, _Place] = OrderedDict()
        self._kept = 0

    def read(self, name: str, start: int, size: int) -> bytes:
        """`size` bytes from `start`, fewer where the file ends."""
        with self._lock:
            place = self._places.get(name, _Place())
        offset, end = start - place.start, start + size
        if offset < 0 or end > place.start + len(place.data):
            goes_on = 0 <= place.read_to <= start <= place.read_to + NEAR
            ahead = min(_GROWTH * max(place.ahead, size), AHEAD) if goes_on else 0
            kept = place.data[offset:] if offset >= 0 else b""
            place = _Place(end, start, kept + self._fetch(name, start + len(kept), end + ahead), ahead)
            offset = 0
        wanted = place.data[offset : offset + size]
        self._remember(name, place._replace(read_to=end, data=place.data if place.ahead else b""))
        return wanted

    def _remember(self, name: str, place: _Place) -> None:
        with self._lock:
            self._kept += len(place.data) - len(self._places.get(name, _Place()).data)
            self._places[name] = place
            self._places.move_to_end(name)
            while self._kept > KEPT or len(self._places) > FILES:
                self._kept -= len(self._places.popitem(last=False)[1].data)
