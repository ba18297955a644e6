"""The bytes of a cache on disk do not change."""

from pathlib import Path

import numpy as np
import pytest

from distill.cache import CacheReader
from distill.cache.open_store import open_store
from distill.tools.commands import main
from distill.tools.verify import verify
from tests import format_reader
from tests.golden import cache_maker

HERE = Path(__file__).parent
NOW, OLD = HERE / "cache-v3", HERE / "cache-v2"


def test_the_bytes_of_a_cache_do_not_change(tmp_path):
    cache_maker.make(tmp_path)
    files = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    golden = {path.relative_to(NOW) for path in NOW.rglob("*") if path.is_file()}
    # Header, ranks, two shards between two marks, a snapshot and its listing.
    assert files == golden and len(files) == 4 * 8
    for name in files:
        assert (tmp_path / name).read_bytes() == (NOW / name).read_bytes(), name


@pytest.mark.parametrize("name", cache_maker.CODECS)
def test_the_golden_cache_says_what_was_put_into_it(name):
    """To the slow reader of the format's page, which shares no code with the writer."""
    check(NOW / name, name)


def check(folder, name):
    found = format_reader.cache(folder)
    assert sorted(found) == [1, 3, 9] and found[9][0] == 4
    for sample, (_, _, tokens) in found.items():
        for t, (token, want) in enumerate(zip(tokens, cache_maker.rows(name, sample))):
            assert (token is None) == (t == cache_maker.S - 1)
            assert token is None or sorted(token[3]) == sorted(want)


@pytest.mark.parametrize("name", cache_maker.CODECS)
def test_the_golden_cache_of_format_2_is_converted(tmp_path, name, capsys):
    """Into records that are those of format 3, byte for byte, and targets that are equal bit for bit."""
    before = {path: path.read_bytes() for path in (OLD / name).rglob("*") if path.is_file()}
    assert main(["compact", str(OLD / name), "--into", str(tmp_path / "new")]) == 0
    assert "3 records in 1 shards" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in (OLD / name).rglob("*") if path.is_file()}
    check(tmp_path / "new", name)
    assert verify(open_store(tmp_path / "new"), decode=True).problems == []
    old, new = CacheReader(NOW / name), CacheReader(tmp_path / "new")
    assert {s.sample_id: s.data for s in old.samples()} == {s.sample_id: s.data for s in new.samples()}
    ids = np.arange(cache_maker.SAMPLES)
    digests = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    a, b = (reader.read(ids, digests) for reader in (old, new))
    assert all(x.equal(y) for x, y in zip(a.targets, b.targets)) and a.step_B.equal(b.step_B)
    assert new.header == old.header and new.finished and new.frontier is None
    ours, theirs = ([row[:4] for row in reader.losses.json()] for reader in (new, old))
    assert ours == theirs
    # Losses are those of the stored log-probabilities, which have an error of about a percent.
    np.testing.assert_allclose(new.losses.curve().losses, old.losses.curve().losses, rtol=0.02)
    assert main(["compact", str(OLD / name), "--into", str(tmp_path / "new")]) == 0
    assert "0 records in 0 shards" in capsys.readouterr().out and new.losses == CacheReader(tmp_path / "new").losses
