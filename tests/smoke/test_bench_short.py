"""Short forms of `make bench ONLY=codec` and `ONLY=cache`: what they report is what they say, on few rows."""

import json
import subprocess

import pytest
import torch

from tests.bench import cache, codec
from tests.bench._codec_meter import CodecSetting, sweep
from tests.bench._yardstick import rows

COUNT = 96


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_errors_of_the_bench_are_those_of_theory(monkeypatch):
    """The variance of N independent draws, of counts floor(N p) or ceil(N p) and of tails; the bias of top-k."""
    monkeypatch.setattr(codec, "ROWS", COUNT)
    settings = sweep({"multinomial": (50,), "systematic": (17,), "topk": (4,), "threshold": (0.05,)})
    measured = codec.measure(settings, seed=3, count=COUNT)
    p_TV = torch.cat(list(rows(COUNT, seed=3)))
    share_TV = (17 * p_TV) % 1
    want = {
        "multinomial": (1 - p_TV.square().sum(1)) / 50,
        "systematic": (share_TV * (1 - share_TV)).sum(1) / 17**2,
        "threshold": torch.where(p_TV < 0.05, p_TV * (0.05 - p_TV), 0.0).sum(1),
        "topk": p_TV.square().sum(1) - p_TV.topk(4).values.square().sum(1),
    }
    for (name, _), one in measured.items():
        # topk's own rounding to a byte, up to 3 % of a probability, comes on top of its bias.
        slack = 5e-4 if name == "topk" else 0.0
        assert one.mse == pytest.approx(float(want[name].mean()), rel=0.2, abs=slack)
    assert measured[CodecSetting("systematic", 17)].bytes < measured[CodecSetting("multinomial", 50)].bytes


def test_flat_rows_need_more_draws(monkeypatch):
    """On flat rows 20 systematic draws are worse than 50 independent ones; 50 systematic draws are better."""
    monkeypatch.setattr(codec, "ENTROPIES", (0.6, 8.0))
    results = codec.by_entropy(seed=3, count=COUNT)
    peaked, flat = (
        {key.removeprefix(prefix): value for key, value in results.items() if key.startswith(prefix)}
        for prefix in ("0.6 nats, ", "8 nats, ")
    )
    assert peaked["entropy"] == pytest.approx(0.6, rel=0.25) and flat["entropy"] == pytest.approx(8, rel=0.25)
    assert flat["systematic 20: bytes"] > 4 * peaked["systematic 20: bytes"]
    assert flat["topk 12: bytes"] == pytest.approx(peaked["topk 12: bytes"], rel=0.2)
    assert flat["systematic 50: mse"] < flat["multinomial 50: mse"] < flat["systematic 20: mse"]
    draws = "systematic at RS-KD's error: parameter"
    assert peaked[draws] < 20 < 30 < flat[draws]


def test_long_samples_take_fewer_bytes(monkeypatch):
    """The coder's models adapt within a record, and an entry of the index is shared by more tokens."""
    monkeypatch.setattr(codec, "LENGTHS", (8, 24, 96))
    results = codec.by_length(seed=3, count=COUNT)
    for part in ("record", "index"):
        short, middle, long = (results[f"samples of {n}, systematic 20: {part} bytes"] for n in (8, 24, 96))
        assert short > middle > long


def test_between_is_a_straight_line_of_logarithms():
    assert codec.between([1.0, 100.0], [10.0, 1000.0], 10.0) == pytest.approx(100.0)
    with pytest.raises(AssertionError, match="outside"):
        codec.between([1.0, 2.0], [1.0, 2.0], 3.0)


def test_a_small_large_cache_is_read_at_random(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "tokens_of", lambda count, made=cache.tokens_of: made(count, distinct=64))
    monkeypatch.setattr(cache, "TOKENS", 12 * 2 * cache.SAMPLE)
    monkeypatch.setattr(cache, "SHARDS", 12)
    samples = cache.large_cache(tmp_path)
    assert samples == 24 and len(list((tmp_path / "shards").rglob("*.safetensors"))) == 12
    results = json.loads(subprocess.check_output(cache.fresh_process(str(tmp_path), samples, reads=40)))
    assert results.keys() == {"open_ms", "resident_mb", "process_mb", "random_reads_s"}
    assert all(value > 0 for value in results.values())
