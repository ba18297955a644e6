"""A corpus that joins after the teacher was trained, through the real command line; kills; foreign teachers."""

import json
import shutil

import numpy as np
import pytest

from distill.cache import CacheReader
from distill.cache.format import shard_name
from tests.cli import TINY, kill_once, rows, run, write_corpus
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


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A teacher trained on `main` alone, for less than an epoch; and the command line that adds `extra`."""
    folder = tmp_path_factory.mktemp("taught")
    main = write_corpus(folder / "main")
    write_corpus(folder / "extra", documents=60)
    own = folder / "conf" / "experiment"
    own.mkdir(parents=True)
    (own / "both.yaml").write_text(EXPERIMENT.format(extra=folder / "extra" / "corpus.jsonl"))
    alone = [*TINY, main, f"data.dir={folder}/data"]
    run(*alone, "job=teacher", "teacher.train.steps=12", f"hydra.run.dir={folder}/t")
    both = [f"--config-dir={folder}/conf", "experiment=both", *alone, f"data.tokenizer.file={folder}/t/tokenizer.json"]
    return folder, alone, both


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def backfilled(cache):
    return headers(cache, "backfill")


def labelled_ids(cache):
    """Ids in the shards that a backfill published, as often as they are there."""
    from safetensors.numpy import load_file

    files = [cache / shard_name(each.writer, each.seq) for each in backfilled(cache)]
    return np.sort(np.concatenate([load_file(file)["sample_ids"] for file in files]))


def test_a_second_corpus_joins_the_mix_after_the_teacher_was_trained(taught, tmp_path):
    folder, _, both = taught
    shutil.copytree(folder / "t" / "cache", tmp_path / "main")
    caches = [f"cache.dirs.main={tmp_path}/main", f"cache.dirs.extra={tmp_path}/extra"]
    label = [*both, *caches, "job=backfill", f"init_from={folder}/t", "backfill.corpora=[extra]", "backfill.batch=5",
             "backfill.unit_samples=16"]  # fmt: skip
    plan = run(*label, "backfill.dry_run=true", f"hydra.run.dir={tmp_path}/plan")
    assert "to label" in plan.stdout and "TFLOP" in plan.stdout and not (tmp_path / "extra").exists()
    done = run(*label, f"hydra.run.dir={tmp_path}/b")
    found = summary(tmp_path / "b")
    reader = CacheReader(tmp_path / "extra")
    samples = reader.header.samples
    assert found["coverage"] == 1.0 and found["samples"] == samples == summary(tmp_path / "plan")["gaps"]
    assert (labelled_ids(tmp_path / "extra") == np.arange(samples)).all()
    # Trained for 12 steps of 4 samples of 16 tokens, and never on this corpus.
    origins = [origin for row in backfilled(tmp_path / "extra") for origin in row.origins]
    assert {(o.first_step, o.last_step, o.tokens_seen, o.seen_before) for o in origins} == {(12, 12, 768, False)}
    assert {o.teacher for o in origins} == {found["teacher"]} and found["teacher"] in done.stdout
    # The teacher that captured, as it was after its 12th step.
    (captured,) = {origin.teacher for origin in CacheReader(folder / "t" / "cache").summary}
    assert found["teacher"] == f"{captured}@12"
    per_token = origins[0].flops_per_token
    assert per_token > 0
    assert found["flops"]["backfill_tflops"] == pytest.approx(samples * 16 * per_token / 1e12)
    assert found["flops"]["backfilled_tokens"] == sum(o.tokens for o in origins)
    logged = rows(tmp_path / "b")
    assert logged[-1]["step"] == samples and logged[-1]["tokens"] == samples * 16
    # The same teacher, measured on what it labelled: its loss falls short of a uniform one's.
    assert 0 < found["loss"] < np.log(272)

    student = [*both, *caches, "job=student", "student.train.steps=12"]
    refused = run(*student, f"hydra.run.dir={tmp_path}/r", code=2)
    assert "student.replay.order=own" in refused.stderr and "Traceback" not in refused.stderr
    # The teacher did not finish an epoch of main: the backfill of all corpora fills what it never met.
    rest = run(*both, *caches, "job=backfill", f"init_from={folder}/t", f"hydra.run.dir={tmp_path}/b2")
    assert summary(tmp_path / "b2")["coverage"] == 1.0 and "corpus extra" in rest.stdout
    assert {o.seen_before for row in backfilled(tmp_path / "main") for o in row.origins} == {True}
    run(*student, "student.replay.order=own", "cache.on_missing=fail", f"hydra.run.dir={tmp_path}/s")
    assert summary(tmp_path / "s")["coverage"] == 1.0
    assert any("lag_factor" in row for row in rows(tmp_path / "s"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_backfill_killed_at_any_moment_labels_each_sample_once(taught, tmp_path, ranks):
    folder, _, both = taught
    cache = tmp_path / "extra"
    label = [*both, f"cache.dirs.extra={cache}", "job=backfill", f"init_from={folder}/t", "backfill.corpora=[extra]",
             "backfill.batch=1", "backfill.unit_samples=4", "cache.shard_samples=3"]  # fmt: skip
    if ranks == 1:
        for published in (3, 9):
            kill_once(
                cache / "shards" / "*" / "*" / "*.safetensors",
                published,
                *label,
                f"hydra.run.dir={tmp_path}/b",
                "resume=true",
            )
        before = {(row.writer, row.seq) for row in backfilled(cache)}
        assert before
        run(*label, f"hydra.run.dir={tmp_path}/b", "resume=true")
        assert before < {(row.writer, row.seq) for row in backfilled(cache)}
    else:
        run(*label, f"hydra.run.dir={tmp_path}/b", ranks=2)
        assert {row.writer for row in backfilled(cache)} == {"backfill-00000", "backfill-00001"}
    reader = CacheReader(cache)
    assert (labelled_ids(cache) == np.arange(reader.header.samples)).all()
    assert summary(tmp_path / "b")["coverage"] == 1.0 and reader.finished is False
    one = {o.teacher for row in backfilled(cache) for o in row.origins}
    assert len(one) == 1


def test_stale_records_are_beaten_within_a_budget(taught, tmp_path):
    _, alone, _ = taught
    run(*alone, "job=teacher", "teacher.train.steps=30", "teacher.optim.lr=2e-2", "seed=3",
        f"hydra.run.dir={tmp_path}/t")  # fmt: skip
    cache = tmp_path / "t" / "cache"
    before = CacheReader(cache)
    ids = np.arange(before.header.samples)
    losses = before.read(ids, before.digests(ids)).shard_loss_B.numpy()
    lag = losses - np.nanmin(losses)
    stale = np.flatnonzero(lag >= 0.3)
    assert len(stale) > 8
    label = [*alone, "job=backfill", f"init_from={tmp_path}/t", f"cache.dir={cache}", "backfill.min_lag=0.3",
             "backfill.unit_samples=4"]  # fmt: skip
    gaps = int((~before.covers(np.arange(before.header.samples))).sum())
    run(*label, f"backfill.max_samples={gaps + 6}", f"hydra.run.dir={tmp_path}/b")
    after = CacheReader(cache)
    steps = after.steps(np.arange(after.header.samples))
    redone = np.flatnonzero((steps == 30) & before.covers(np.arange(before.header.samples)))
    # The stalest come first, and all that they replaced was stale.
    assert len(redone) == 6 and set(redone) <= set(stale)
    assert lag[redone].min() >= np.sort(lag[stale])[-6] - 1e-9
    # The budget is that of the teacher, not of the run.
    again = run(*label, f"backfill.max_samples={gaps + 6}", f"hydra.run.dir={tmp_path}/b2")
    assert summary(tmp_path / "b2")["samples"] == 0 and "nothing to label" in again.stdout


def test_any_causal_language_model_teaches(taught, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder, alone, _ = taught
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=272, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text((folder / "t" / "tokenizer.json").read_text())
    label = [*alone, "job=backfill", f"teacher.from=hf:{tmp_path}/hf"]
    run(*label, f"cache.dir={tmp_path}/c", f"hydra.run.dir={tmp_path}/b")
    found = summary(tmp_path / "b")
    assert found["coverage"] == 1.0 and found["flops"]["backfill_tflops"] > 0
    assert found["loss"] == pytest.approx(np.log(272), abs=0.3)  # it knows nothing
    reader = CacheReader(tmp_path / "c")
    assert {origin.last_step for origin in reader.summary} == {0}

    # A teacher that knows less than those before it replaces nothing, however stale; what it adds is the newest.
    shutil.copytree(folder / "t" / "cache", tmp_path / "copy")
    before = CacheReader(tmp_path / "copy")
    every = np.arange(before.header.samples)
    old = before.steps(every)
    run(*label, "backfill.min_lag=0.01", f"cache.dir={tmp_path}/copy", f"hydra.run.dir={tmp_path}/d")
    assert summary(tmp_path / "d")["stale"] == 0
    assert (CacheReader(tmp_path / "copy").steps(every) == np.where(old < 0, old.max() + 1, old)).all()
    wide = LlamaConfig(**config.to_dict() | {"vocab_size": 280})
    AutoModelForCausalLM.from_config(wide).save_pretrained(tmp_path / "wide")
    other = run(*alone, "job=backfill", f"teacher.from=hf:{tmp_path}/wide", f"cache.dir={tmp_path}/c",
                f"hydra.run.dir={tmp_path}/e", code=2)  # fmt: skip
    assert "vocab_size is 272 in the cache, 280 in this run" in other.stderr
    long = run(*label, "data.sample_tokens=64", f"hydra.run.dir={tmp_path}/f", code=2)
    assert "data.sample_tokens is 64" in long.stderr and "takes 32" in long.stderr
    for done in (other, long):
        assert "Traceback" not in done.stderr


def test_a_teacher_is_itself_wherever_it_lies(taught, tmp_path):
    """A run, two of its checkpoints, copies without the run, an export: known by what they are, not by their place."""
    _, alone, _ = taught
    run(*alone, "job=teacher", "teacher.train.steps=4", "teacher.train.checkpoint_every=2", "teacher.train.log_every=2",
        "teacher.train.keep_checkpoints=2", "teacher.train.balance_rate=0", f"hydra.run.dir={tmp_path}/t")  # fmt: skip
    run("job=export", f"init_from={tmp_path}/t", f"export.dir={tmp_path}/hf", f"hydra.run.dir={tmp_path}/x")
    shutil.copytree(tmp_path / "t" / "checkpoints" / "step-00000002", tmp_path / "early")
    shutil.move(tmp_path / "t", tmp_path / "moved")
    (captured,) = {origin.teacher for origin in CacheReader(tmp_path / "moved" / "cache").summary}
    alone = [*alone, f"data.tokenizer.file={tmp_path}/moved/tokenizer.json", f"cache.dir={tmp_path}/c",
             "backfill.max_samples=6", "job=backfill", "cache.shard_samples=2"]  # fmt: skip
    run(*alone, f"init_from={tmp_path}/moved", f"hydra.run.dir={tmp_path}/b0")
    assert summary(tmp_path / "b0")["samples"] == 6
    for number, (source, step, done) in enumerate([("hf", 4, 6), ("early", 2, 0)]):
        again = run(
            *alone, f"init_from={tmp_path}/{source}", "backfill.dry_run=true", f"hydra.run.dir={tmp_path}/d{number}"
        )
        assert summary(tmp_path / f"d{number}")["teacher"] == f"{captured}@{step}"
        assert f"6 have targets ({done} by this teacher)" in again.stdout


def test_a_teacher_of_another_tokenizer_is_refused(taught, tmp_path):
    folder, alone, _ = taught
    done = run(*alone, "data.tokenizer.vocab_size=266", "job=backfill", f"init_from={folder}/t",
               f"hydra.run.dir={tmp_path}/b", code=2)  # fmt: skip
    assert f"set data.tokenizer.file={folder}/t/tokenizer.json" in done.stderr and "Traceback" not in done.stderr
