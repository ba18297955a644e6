"""The size of a cache before it is written: from a cache, and from the table of measured bytes per token."""

import json

import pytest

from distill.cache import CacheWriter
from distill.cache.open_store import open_store
from distill.config.schema import CodecConfig
from distill.tools.commands import main
from distill.tools.estimate import from_table
from distill.tools.stats import stats
from tests.bench import record_bytes
from tests.workers.cache_writers import SAMPLES, header, put


def test_an_estimate_and_what_a_cache_becomes(tmp_path, capsys):
    """Everything but the bytes of records follows from the numbers, and agrees with a cache that was written."""
    with CacheWriter(tmp_path, header(), writer="w", shard_samples=8) as writer:
        for first in range(0, SAMPLES, 8):
            put(writer, list(range(first, first + 8)))
    found = stats(open_store(tmp_path))
    records = found["bytes"]["shards"]["records"] / found["tokens"]
    assert main(["estimate", "--like", str(tmp_path), "--tokens", "640", "--shard-samples", "8", "--json",
                 "--tokens-per-second", "64"]) == 0  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["shards"], found["seconds"]) == (40, 5, 10)
    assert found["per_token"]["likely"] == pytest.approx(records)
    # The last token of a sample has no target here, while an estimate counts every token.
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock")
    assert found["likely"] == pytest.approx(size, rel=0.25)
    assert found["low"] <= found["likely"] <= found["high"]
    assert main(["estimate", "--like", str(tmp_path), "--tokens", "640", "--draws", "7"]) == 2


def test_the_table_of_estimates_is_what_the_codecs_write():
    """One vocabulary and entropy of it, measured anew; between its numbers the estimate lies between them."""
    measured = record_bytes.measure(1024, 1.9)
    for setting, size in measured.items():
        assert from_table(setting.config(), 1024, 1.9).likely == pytest.approx(size, rel=0.01)
    low, between, high = (from_table(CodecConfig(), 5000, entropy).likely for entropy in (1.9, 2.5, 3.2))
    assert low < between < high and 5.622 < from_table(CodecConfig(draws=14), 1024, 1.9).likely < 7.953
    assert (
        from_table(CodecConfig(draws=1000), 202_048, 3.2).likely > 100 > from_table(CodecConfig(draws=1), 99, 1).likely
    )


def test_an_estimate_grows_with_what_it_should(capsys):
    def bytes_of(*arguments):
        assert main(["estimate", "--tokens", "1e9", "--json", "--sample-tokens", "512", *arguments]) == 0
        return json.loads(capsys.readouterr().out)["per_token"]["likely"]

    base = bytes_of("--vocab-size", "1000")
    assert bytes_of("--vocab-size", "1000", "--entropy", "3") > base > bytes_of("--vocab-size", "1000", "--draws", "5")
    assert bytes_of("--vocab-size", "50000") > base > bytes_of("--vocab-size", "1000", "--entropy", "0.2")
