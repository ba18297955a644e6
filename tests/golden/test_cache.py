"""The bytes of a cache on disk do not change."""

from pathlib import Path

import pytest

from tests import format_reader
from tests.golden import cache_maker

HERE = Path(__file__).parent


def test_the_bytes_of_a_cache_do_not_change(tmp_path):
    cache_maker.make(tmp_path)
    files = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    golden = {p.relative_to(HERE / "cache-v2") for p in (HERE / "cache-v2").rglob("*") if p.is_file()}
    assert files == golden and len(files) == 4 * 5
    for name in files:
        assert (tmp_path / name).read_bytes() == (HERE / "cache-v2" / name).read_bytes(), name


@pytest.mark.parametrize("name", cache_maker.CODECS)
def test_the_golden_cache_says_what_was_put_into_it(name):
    """To the slow reader of the format's page, which shares no code with the writer."""
    found = format_reader.cache(HERE / "cache-v2" / name)
    assert sorted(found) == [1, 3, 9] and found[9][0] == 4
    for sample, (_, _, tokens) in found.items():
        for t, (token, want) in enumerate(zip(tokens, cache_maker.rows(name, sample))):
            assert (token is None) == (t == cache_maker.S - 1)
            assert token is None or sorted(token[3]) == sorted(want)
