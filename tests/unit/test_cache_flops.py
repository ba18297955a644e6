"""The ledger of floating-point operations, whose record is the newest, and writers that do not hold a student up."""

import numpy as np
import pytest

from distill.cache import CacheReader, CacheWriter
from distill.tools.flops import flop_ledger
from tests.workers.cache_writers import SAMPLES, S, header, put


@pytest.fixture
def mixed(tmp_path):
    """Captured at steps 3 and 4, backfilled at step 9, and imported by somebody."""
    with CacheWriter(tmp_path, header(), writer="t", shard_samples=4, flops_per_token=2e9) as writer:
        put(writer, [0, 1, 2, 3], step=3)
        put(writer, [4, 5, 6, 7], step=4)
        writer.finish()
    made = dict(source="backfill", seen_before=True, flops_per_token=5e9)
    with CacheWriter(tmp_path, header(), writer="backfill-00000", shard_samples=3, **made) as writer:
        put(writer, [2, 8, 9], step=9, teacher="frozen")
    with CacheWriter(tmp_path, header(), writer="import-0", source="import") as writer:
        put(writer, [20, 21], step=0, teacher="other")
    return tmp_path


def test_every_pass_is_counted_where_it_was_paid(mixed):
    reader = CacheReader(mixed)
    found = flop_ledger(reader.summary, S)
    # One token of each of these samples has no target, but went through the teacher.
    assert found == {
        "captured_tokens": 8 * (S - 1),
        "saved_tflops": pytest.approx(8 * S * 2e9 / 1e12),
        "training_tflops": pytest.approx(3 * 8 * S * 2e9 / 1e12),
        "backfilled_tokens": 3 * (S - 1),
        "backfill_tflops": pytest.approx(3 * S * 5e9 / 1e12),
        "imported_tokens": 2 * (S - 1),
        "unpriced_tokens": 0,
    }


def test_a_teacher_of_unknown_cost_is_named_not_priced(tmp_path):
    with CacheWriter(tmp_path, header(), writer="t") as writer:
        put(writer, [0, 1])
    found = flop_ledger(CacheReader(tmp_path).summary, S)
    assert found["unpriced_tokens"] == 2 * (S - 1) and found["saved_tflops"] == 0


def test_origins_are_those_of_the_newest_records(mixed):
    reader = CacheReader(mixed)
    ids = np.array([9, 0, 2, 30, 4, 20, 2])
    numbers, origins = reader.origins(ids)
    assert [None if n < 0 else origins[n].teacher for n in numbers] == [
        "frozen", "t", "frozen", None, "t", "other", "frozen",
    ]  # fmt: skip
    assert [o.last_step for o in (origins[n] for n in numbers[[1, 4]])] == [3, 4]
    numbers, origins = reader.origins(np.arange(SAMPLES))
    assert np.flatnonzero(numbers >= 0).tolist() == [*range(10), 20, 21]
    assert len(reader.origins(np.array([30, 31]))[1]) == 0
    losses = reader.read(ids, reader.digests(ids)).shard_loss_B.numpy()
    assert np.isnan(losses[3]) and losses[0] == losses[2] != losses[1]


def test_a_backfill_that_has_not_published_yet_holds_nobody_up(mixed):
    reader = CacheReader(mixed)
    assert reader.finished and reader.frontier is None
    with CacheWriter(mixed, header(), writer="backfill-00001", source="backfill"):
        reader.refresh()
        assert reader.finished and reader.frontier is None
    with CacheWriter(mixed, header(), writer="u"):
        reader.refresh()
        assert not reader.finished and reader.frontier == 0
