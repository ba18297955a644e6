"""Sums of the teacher's losses by its step, which do not depend on how shards are cut."""

import shutil

import numpy as np
import pytest

from distill.cache import CacheReader, CacheWriter, cataloging
from distill.cache.loss_curve import LossSums, bin_of, first_step
from tests import format_reader
from tests.workers.cache_writers import SAMPLES, batch, header, put


def written(folder, shard_samples, index_every, order):
    with CacheWriter(folder, header(), writer="w", shard_samples=shard_samples, index_every=index_every) as writer:
        for step, ids in order:
            put(writer, ids, step=step)
        writer.finish()
    return CacheReader(folder)


ORDER = [
    (step, [(7 * step + i) % SAMPLES for i in range(1 + step % 5)]) for step in (*range(40), 63, 64, 65, 100, 130, 1000)
]


def test_sums_of_losses_do_not_depend_on_how_shards_are_cut(tmp_path):
    """Exactly; they are those that the second reader adds up, and merging listings changes nothing."""
    tokens = []
    for step, ids in ORDER:
        made = batch(ids, step=step)
        tokens += [("t", "capture", step, -float(loss)) for loss in made.label_logprob[made.valid].double()]
    want = format_reader.loss_sums(tokens)
    for n, (shard_samples, index_every) in enumerate(((1, 1), (3, 2), (7, 100), (256, 64))):
        reader = written(tmp_path / str(n), shard_samples, index_every, ORDER)
        assert reader.losses.json() == want
        cataloging.update(reader._store, reader.header, is_merging=True)
        assert CacheReader(tmp_path / str(n)).losses.json() == want
        shutil.rmtree(tmp_path / str(n) / "catalog")
        assert CacheReader(tmp_path / str(n)).losses.json() == want


def test_the_curve_of_a_teacher_is_the_mean_of_its_bins(tmp_path):
    reader = written(tmp_path, 4, 3, ORDER)
    curve, bins = reader.losses.curve("t"), {}
    for step, ids in ORDER:
        made = batch(ids, step=step)
        bins.setdefault(bin_of(step), []).extend((-made.label_logprob[made.valid]).tolist())
    assert curve.first_steps.tolist() == [first_step(number) for number in sorted(bins)]
    np.testing.assert_allclose(curve.losses, [np.mean(bins[number]) for number in sorted(bins)], rtol=1e-6)
    assert curve.tokens.tolist() == [len(bins[number]) for number in sorted(bins)]
    assert len(reader.losses.curve("nobody").losses) == len(reader.losses.curve(source="import").losses) == 0


def test_no_label_poisons_a_mean():
    sums = LossSums()
    sums.add_tokens("t", "capture", np.array([0, 0, 0]), np.array([1.0, 1e30, -5.0]))
    assert sums.json() == [["t", "capture", 0, 3, 33 * 2**20]]


def test_bins_of_steps():
    """Each step below 64 by itself, then 32 for each doubling; every bin begins where it says."""
    numbers = [bin_of(step) for step in range(5000)]
    assert numbers[:65] == list(range(65)) and numbers == sorted(numbers)
    assert [bin_of(2**k) - bin_of(2 ** (k - 1)) for k in range(7, 30)] == [32] * 23
    assert all(bin_of(first_step(n)) == n and (n == 0 or bin_of(first_step(n) - 1) == n - 1) for n in range(900))


@pytest.mark.parametrize(
    "row",
    [
        ["t", "capture", -1, 1, 1],
        ["t", "capture", 0, 0, 0],
        ["t", "capture", 0, 1, -1],
        ["t", "capture", 0, 1, 33 * 2**20],
        ["t", "capture", 0, 1.0, 1],
        [1, "capture", 0, 1, 1],
    ],
)
def test_sums_that_cannot_be_are_refused(row):
    with pytest.raises(ValueError, match="is no bin of loss sums"):
        LossSums.of([row])
