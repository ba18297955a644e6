"""A run that is refused leaves its folder free: the corrected command starts there."""

import pytest

from tests.cli import TINY, rows, run, write_corpus

RECORDS = ("config.yaml", "metrics.jsonl", "tokenizer.json", "wandb", "summary.json")
NEEDY = """
from distill.config.registry import FACTORS


class Needy:
    def __init__(self, setting, options):
        options["by"]


FACTORS.add("needy", Needy)
"""


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """The folder of a teacher's run with a cache, and the start of a student's command line."""
    folder = tmp_path_factory.mktemp("refused")
    common = [*TINY, write_corpus(folder / "text"), "tracking=offline"]
    run(*common, "job=teacher", "teacher.train.steps=4", f"hydra.run.dir={folder}/t", "tracking=off")
    (folder / "needy.py").write_text(NEEDY)
    student = [*common, "job=student", "student.train.steps=4", f"data.tokenizer.file={folder}/t/tokenizer.json"]
    return folder, student


@pytest.mark.parametrize("fault", ["cache", "tokenizer", "length", "plugin"])
def test_a_refused_student(taught, tmp_path, monkeypatch, fault):
    folder, start = taught
    monkeypatch.setenv("PYTHONPATH", str(folder))
    there = [f"hydra.run.dir={tmp_path}/s", f"cache.dir={folder}/t/cache"]
    wrong, expected = {
        "cache": ([*start, there[0], f"cache.dir={tmp_path}/none"], f"{tmp_path}/none: no cache here"),
        "tokenizer": ([*start[:-1], *there, "data.tokenizer.vocab_size=265"], "tokenizer"),
        "length": ([*start, *there, "data.sample_tokens=32"], "sample_tokens"),
        "plugin": (
            [*start, *there, "plugins=[needy]", "+student.weighting.plugins.needy.bye=1"],
            "student.weighting.plugins.needy.by has no value",
        ),
    }[fault]
    refused = run(*wrong, code=2).stderr
    assert expected in refused and "Traceback" not in refused
    assert not [name for name in RECORDS if (tmp_path / "s" / name).exists()]
    assert (tmp_path / "s" / "data").exists() == (fault != "cache")  # nothing heavy was done in vain
    run(*start, *there, "tracking=off")
    assert rows(tmp_path / "s")
