"""Parts that a user's module adds are used through the command line: trained with, logged, saved and resumed."""

import json

import numpy as np
import pytest
import torch

from distill.cache import CacheReader
from distill.config import registry
from distill.config.errors import CacheError
from tests.cli import TINY, kill_once, losses, rows, run, write_corpus

# ---------------------------------------------------------------- a codec

TOY_CODEC = """
import torch

from distill.cache import Atoms, Codec
from distill.config.registry import CODECS, CodecEntry


class Coarse(Codec):
    \"\"\"The most probable ids, in ten-thousandths.\"\"\"

    unbiased = False
    max_code = 10_000

    def __init__(self, config, vocab_size):
        self.max_atoms = config.options["keep"]

    def _select(self, p_TV, seed, sample_ids_T, positions_T):
        p_TK, ids_TK = p_TV.topk(self.max_atoms)
        counts_T = torch.full((len(p_TV),), self.max_atoms, dtype=torch.int32)
        codes_N = (10_000 * p_TK.nan_to_num()).round().flatten().int()
        return Atoms(counts_T, ids_TK.flatten().int(), codes_N, torch.empty(0, dtype=torch.uint8))

    def probs(self, atoms):
        return atoms.codes_N / 10_000


def rules(config, vocab_size):
    if not 1 <= config.options.get("keep", 0) <= vocab_size:
        yield f"options is {config.options}; it must say keep, 1 to {vocab_size}"


CODECS.add("coarse", CodecEntry(Coarse, ("options",), rules))
"""


def test_a_codec_is_captured_read_back_and_resumed(tmp_path, monkeypatch):
    (tmp_path / "toy_codec.py").write_text(TOY_CODEC)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    common = [*TINY, write_corpus(tmp_path / "main"), f"data.dir={tmp_path}/data", "plugins=[toy_codec]"]
    teacher = [*common, "job=teacher", "teacher.train.steps=10", "teacher.train.checkpoint_every=3",
               "teacher.train.log_every=1", "cache.codec.name=coarse"]  # fmt: skip
    refused = run(*teacher, f"hydra.run.dir={tmp_path}/refused", code=2)
    assert "cache.codec.options is {}; it must say keep, 1 to 272" in refused.stderr

    teacher.append("+cache.codec.options={keep:3}")
    run(*teacher, f"hydra.run.dir={tmp_path}/t")
    kill_once(tmp_path / "killed" / "checkpoints" / "step-00000006", 1, *teacher, f"hydra.run.dir={tmp_path}/killed")
    run(*teacher, f"hydra.run.dir={tmp_path}/killed", "resume=true")
    assert losses(tmp_path / "killed") == losses(tmp_path / "t")

    header = json.loads((tmp_path / "t" / "cache" / "cache.json").read_text())
    assert header["codec"] == {"name": "coarse", "options": {"keep": 3}}
    with pytest.raises(CacheError, match=r"codec\.name is coarse; allowed: systematic"):
        CacheReader(tmp_path / "t" / "cache")
    monkeypatch.setattr(registry.CODECS, "_entries", dict(registry.CODECS._entries))
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.import_plugins(["toy_codec"]) == []
    whole, resumed = (CacheReader(tmp_path / name / "cache") for name in ("t", "killed"))
    ids = np.flatnonzero(whole.covers(np.arange(whole.header.samples)))
    a, b = (reader.read(ids, whole.digests(ids)).targets for reader in (whole, resumed))
    assert len(ids) == 40 and all(torch.equal(x, y) for x, y in zip(a, b))
    assert a.probs_TK.shape[1] == 3 and a.covered_T.any() and (a.probs_TK[a.covered_T].sum(-1) > 0).all()

    student = [*common, "job=student", "student.train.steps=10", "student.train.checkpoint_every=3",
               "student.train.log_every=1", f"cache.dir={tmp_path}/t/cache", "cache.on_missing=fail"]  # fmt: skip
    run(*student, f"hydra.run.dir={tmp_path}/s")
    kill_once(tmp_path / "again" / "checkpoints" / "step-00000006", 1, *student, f"hydra.run.dir={tmp_path}/again")
    run(*student, f"hydra.run.dir={tmp_path}/again", "resume=true")
    assert losses(tmp_path / "again") == losses(tmp_path / "s")
    assert all(row["student/soft_loss"] > 0 for row in rows(tmp_path / "s") if "student/soft_loss" in row)
