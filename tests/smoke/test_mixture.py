"""A mixture of corpora from the user's own experiment file, one cache for each; caches that do not fit."""

import json

from tests.cli import TINY, run, write_corpus
from tests.shards import headers

EXPERIMENT = """# @package _global_
data:
  corpora:
    extra:
      source: files
      files: [{extra}]
      held_out: 0.2
      weight: 0.5
"""


def test_a_mixture_trains_captures_and_distills(tmp_path):
    main = write_corpus(tmp_path / "main")
    write_corpus(tmp_path / "extra", documents=25)
    own = tmp_path / "conf" / "experiment"
    own.mkdir(parents=True)
    (own / "both.yaml").write_text(EXPERIMENT.format(extra=tmp_path / "extra" / "corpus.jsonl"))
    common = [f"--config-dir={tmp_path}/conf", "experiment=both", *TINY, main, f"data.dir={tmp_path}/data"]
    run(*common, "job=teacher", "teacher.train.steps=12", f"hydra.run.dir={tmp_path}/t")
    caches = {name: tmp_path / "t" / "cache" / name for name in ("main", "extra")}
    samples = {name: sum(shard.samples for shard in headers(folder)) for name, folder in caches.items()}
    # Weights 1 and 0.5 of 48 samples.
    assert samples == {"main": 32, "extra": 16}
    run(
        *common, "job=student", "student.train.steps=12", f"cache.dir={tmp_path}/t/cache", "cache.on_missing=fail",
        "student.replay.order=newest", f"hydra.run.dir={tmp_path}/s",
    )  # fmt: skip
    assert json.loads((tmp_path / "s" / "summary.json").read_text())["coverage"] == 1.0


def test_a_cache_of_another_vocabulary_or_packing_is_refused_with_both_values(tmp_path):
    common = [*TINY, write_corpus(tmp_path / "main"), f"data.dir={tmp_path}/data"]
    run(*common, "job=teacher", "teacher.train.steps=4", f"hydra.run.dir={tmp_path}/t")
    student = [*common, "job=student", "student.train.steps=4", f"cache.dir={tmp_path}/t/cache"]
    other = run(*student, "student.model.vocab_size=271", f"hydra.run.dir={tmp_path}/a", code=2)
    assert "271" in other.stderr and "272" in other.stderr
    longer = run(*student, "data.sample_tokens=32", f"hydra.run.dir={tmp_path}/b", code=2)
    assert "sample_tokens is 16 in the cache, 32 in this run" in longer.stderr
    none = run(*student[:-1], f"cache.dir={tmp_path}/nowhere", f"hydra.run.dir={tmp_path}/c", code=2)
    assert "no cache here" in none.stderr
    taken = run(*common, "job=teacher", "teacher.train.steps=4", f"cache.dir={tmp_path}/t/cache",
                f"hydra.run.dir={tmp_path}/d", code=2)  # fmt: skip
    assert "holds targets of another run" in taken.stderr
    for done in (other, longer, none, taken):
        assert "Traceback" not in done.stderr


def test_a_run_folder_that_cannot_be_made_is_one_clear_error(tmp_path):
    done = run(
        *TINY, write_corpus(tmp_path / "main"), f"data.dir={tmp_path}/data", "job=teacher", "teacher.train.steps=4",
        "hydra.run.dir=/dev/full/run", code=2,
    )  # fmt: skip
    assert "/dev/full" in done.stderr and "Traceback" not in done.stderr
