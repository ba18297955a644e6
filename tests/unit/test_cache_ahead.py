"""Read-ahead over files of a slow store."""

import numpy as np

from distill.cache import ahead as ahead_module
from distill.cache.ahead import ReadAhead


class File:
    """Counts what is asked of it."""

    def __init__(self, size):
        self.data = np.random.default_rng(0).bytes(size)
        self.asked: list[tuple[int, int]] = []

    def fetch(self, name, start, end):
        self.asked.append((start, end))
        return self.data[start:end]


def test_reading_on_takes_few_requests_and_no_byte_twice():
    file = File(3_000_000)
    ahead = ReadAhead(file.fetch)
    for start in range(0, 3_000_000, 5_000):
        assert ahead.read("f", start, 5_000) == file.data[start : start + 5_000]
    assert len(file.asked) <= 8
    assert all(a[1] == b[0] for a, b in zip(file.asked, file.asked[1:]))


def test_jumping_about_brings_nothing_that_is_not_used():
    file = File(40_000_000)
    ahead = ReadAhead(file.fetch)
    for start in np.random.default_rng(1).permutation(8_000)[:1000].tolist():
        assert ahead.read("f", start * 5_000, 5_000) == file.data[start * 5_000 : start * 5_000 + 5_000]
    assert sum(end - start for start, end in file.asked) < 1.2 * 1000 * 5_000 * 1.5


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(ahead_module, "KEPT", 1_000_000)
    monkeypatch.setattr(ahead_module, "AHEAD", 300_000)
    file = File(2_000_000)
    ahead = ReadAhead(file.fetch)
    for step in range(50):
        for name in "abcdefgh":
            start = step * 20_000
            assert ahead.read(name, start, 20_000) == file.data[start : start + 20_000]
            kept = sum(len(place.data) for place in ahead._places.values())
            assert kept == ahead._kept <= 1_000_000
