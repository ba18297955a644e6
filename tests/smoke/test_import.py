"""A student trains, through the real command line, on targets that another stack made."""

import argparse
import json
import math

import numpy as np
import pytest

from distill.data.packed import PackedCorpus
from distill.tools.import_cache import add_arguments
from distill.tools.import_cache import import_files as import_cache
from tests.cli import TINY, rows, run, write_corpus


def test_a_student_learns_from_imported_targets(tmp_path):
    """The other stack's teacher is sure of the right token, and knows two thirds of the samples."""
    corpus = write_corpus(tmp_path)
    smoke = ("experiment=smoke", *TINY, corpus, f"data.dir={tmp_path}/data")
    run(*smoke, "job=teacher", "teacher.train.steps=2", f"hydra.run.dir={tmp_path}/teacher")
    (folder,) = (tmp_path / "data").glob("main-*")
    packed = PackedCorpus(folder, "train", "main")
    known = range(2 * len(packed) // 3)
    with (tmp_path / "requests.jsonl").open("w") as file:
        for ids in packed.take(np.array(known)).ids.tolist():
            found = [{str(t): {"logprob": math.log(0.9), "rank": 1}} for t in ids[1:]]
            file.write(json.dumps({"prompt_token_ids": ids, "prompt_logprobs": [None, *found]}) + "\n")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    more = ["--from=vllm", f"--corpus={folder}", f"--tokenizer={tmp_path}/teacher/tokenizer.json", "--vocab-size=272"]
    report = import_cache(parser.parse_args([f"{tmp_path}/cache", f"{tmp_path}/requests.jsonl", *more]))
    everything = packed.take(np.arange(len(packed))).ids.tolist()
    equal = [ids for ids in everything if ids in everything[: len(known)]]
    assert (report.matched, report.samples) == (len(known), len(equal))

    student = (
        f"cache.dir={tmp_path}/cache",
        "job=student",
        "student.train.steps=30",
        f"hydra.run.dir={tmp_path}/student",
    )
    run(*smoke, *student)
    found = [r for r in rows(tmp_path / "student") if r["job"] == "student"]
    assert sum(r["coverage"] for r in found) / len(found) == pytest.approx(2 / 3, abs=0.2)
    assert all(math.isfinite(r["loss"]) and r["soft_loss"] > 0 for r in found)
    assert found[-1]["teacher_loss"] == pytest.approx(-math.log(0.9), abs=0.01)
