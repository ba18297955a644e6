"""Short forms of `make bench ONLY=codec` and `ONLY=cache`: what they report is what they say, on few rows."""

import json
import subprocess

import pytest
import torch

from tests.bench import cache, codec
from tests.bench._yardstick import rows

COUNT = 96


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_errors_of_the_bench_are_those_of_theory(monkeypatch):
    """The variance of N independent draws, and of counts floor(N p) or ceil(N p); the bias of top-k. In closed form."""
    monkeypatch.setattr(codec, "ROWS", COUNT)
    settings = [("multinomial", 50), ("systematic", 17), ("topk", 4)]
    found = codec.measure(settings, seed=3, count=COUNT)
    p_TV = torch.cat(list(rows(COUNT, seed=3)))
    share_TV = (17 * p_TV) % 1
    want = {
        "multinomial": (1 - p_TV.square().sum(1)) / 50,
        "systematic": (share_TV * (1 - share_TV)).sum(1) / 17**2,
        "topk": p_TV.square().sum(1) - p_TV.topk(4).values.square().sum(1),
    }
    for (name, _), one in found.items():
        # topk's own rounding to a byte, up to 3 % of a probability, comes on top of its bias.
        slack = 5e-4 if name == "topk" else 0.0
        assert one.mse == pytest.approx(float(want[name].mean()), rel=0.2, abs=slack)
    assert found["systematic", 17].bytes < found["multinomial", 50].bytes


def test_between_is_a_straight_line_of_logarithms():
    assert codec.between([1.0, 100.0], [10.0, 1000.0], 10.0) == pytest.approx(100.0)
    with pytest.raises(AssertionError, match="outside"):
        codec.between([1.0, 2.0], [1.0, 2.0], 3.0)


def test_a_small_large_cache_is_read_at_random(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "tokens_of", lambda count, made=cache.tokens_of: made(count, distinct=64))
    monkeypatch.setattr(cache, "TOKENS", 12 * 2 * cache.SAMPLE)
    monkeypatch.setattr(cache, "SHARDS", 12)
    samples = cache.large_cache(tmp_path)
    assert samples == 24 and len(list((tmp_path / "shards").iterdir())) == 12
    found = json.loads(subprocess.check_output(cache.fresh_process(str(tmp_path), samples, reads=40)))
    assert found.keys() == {"open_ms", "resident_mb", "process_mb", "random_reads_s"}
    assert all(value > 0 for value in found.values())
