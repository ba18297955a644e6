"""Bytes of the cache on disk: today's do not change, and older ones still open."""

import json
from pathlib import Path

import numpy as np
import pytest

from distill.cache import CacheReader
from tests import format_reader
from tests.golden import cache_maker
from tests.workers.cache_writers import digests

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


@pytest.mark.parametrize("name", ["threshold", "multinomial", "topk"])
def test_a_cache_of_format_1_reads_as_it_did(name):
    """`expected.json` is what the program of that time read."""
    want = json.loads((HERE / "cache-v1" / "expected.json").read_text())[name]
    ids = np.array([9, 8, 3])
    result = CacheReader(HERE / "cache-v1" / name).read(ids, digests(ids))
    targets = result.targets
    for i, p, row in zip(targets.ids_TK.tolist(), targets.probs_TK.tolist(), want["rows"]):
        assert {a: b for a, b in zip(i, p) if b} == dict(map(tuple, row))
    assert targets.covered_T.tolist() == want["covered"] and result.step_B.tolist() == want["step"]
    np.testing.assert_array_equal(targets.label_logprob_T, np.array(want["label"], np.float32))
    np.testing.assert_array_equal(targets.entropy_T, np.array(want["entropy"], np.float32))
    losses = [np.nan if loss is None else loss for loss in want["loss"]]
    np.testing.assert_array_equal(result.shard_loss_B, np.array(losses, np.float32))
