"""Alpha does not depend on how a cache is cut, nor on the timing of a teacher that is followed."""

from tests.bench.weighting import STEPS, over_pauses, over_shards
from tests.cli import TINY, write_corpus


def test_alpha_does_not_depend_on_shards_or_pauses(tmp_path):
    data = [write_corpus(tmp_path / "text", documents=60), f"data.dir={tmp_path}/packed", *TINY, *STEPS]
    assert over_shards(tmp_path, data, (4, 256))["alpha_over_shard_size"] < 1e-3
    assert over_pauses(tmp_path, data, seeds=range(2))["alpha_over_pauses"] < 1e-3
