"""A student with more rows than its teacher, a teacher with more rows than its tokenizer, through the command line."""

import json

import numpy as np
import pytest

from distill.cache import CacheReader
from tests.cli import TINY, rows, run, write_corpus


def test_a_padded_student_trains_beside_its_teacher(tmp_path):
    words = [*TINY, write_corpus(tmp_path), "job=codistill", "codistill.rounds=2", "teacher.model.vocab_size=512"]
    words += [f"{role}.train.steps=4" for role in ("teacher", "student")]
    run(*words, "student.model.vocab_size=640", f"hydra.run.dir={tmp_path}/r")
    found = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert found["coverage"] == 1.0 and 0 <= found["agreement"] <= 1 and np.isfinite(found["distilled_loss"])
    assert CacheReader(tmp_path / "r" / "cache").header.vocab_size == 512
    done = run(*words, "student.model.vocab_size=504", f"hydra.run.dir={tmp_path}/s", code=2)
    assert "error: student.model.vocab_size is 504 and teacher.model.vocab_size is 512" in done.stderr


def save_foreign(folder, **more):
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=320, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32, **more)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def test_a_foreign_teacher_with_padded_rows_teaches_whoever_has_as_many(tmp_path):
    save_foreign(tmp_path / "hf")
    words = [*TINY, write_corpus(tmp_path), f"data.dir={tmp_path}/data", f"cache.dir={tmp_path}/c"]
    run(*words, "job=backfill", f"teacher.from=hf:{tmp_path}/hf", f"hydra.run.dir={tmp_path}/b")
    assert CacheReader(tmp_path / "c").header.vocab_size == 320
    student = [*words, "job=student", "student.train.steps=2", "student.replay.order=own", "cache.on_missing=fail"]
    run(*student, "student.model.vocab_size=384", f"hydra.run.dir={tmp_path}/s")
    assert any(row.get("coverage") == pytest.approx(1.0) for row in rows(tmp_path / "s"))
    done = run(*student, f"hydra.run.dir={tmp_path}/r", code=2)  # 272: enough for the tokenizer
    assert "vocab_size is 320 in the cache, 272 in this run" in done.stderr
    assert "set student.model.vocab_size to at least as many" in done.stderr and "Traceback" not in done.stderr


def test_a_foreign_teacher_with_a_cap_that_is_not_applied_is_refused(tmp_path):
    save_foreign(tmp_path / "hf", final_logit_softcapping=30.0)
    words = [*TINY, write_corpus(tmp_path), f"cache.dir={tmp_path}/c"]
    done = run(*words, "job=backfill", f"teacher.from=hf:{tmp_path}/hf", f"hydra.run.dir={tmp_path}/x", code=2)
    assert "(model_type llama) has final_logit_softcapping 30.0, which LlamaForCausalLM" in done.stderr
    assert "Traceback" not in done.stderr
