"""A model that trains under `transfer` is at every moment a plain checkpoint: transformers computes the same logits."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from distill.config.schema import BaseSizes, OptimConfig, Parametrization
from distill.engine import optim
from distill.model import Transformer, hf
from tests.closeness import worst
from tests.parity.test_hf_text import CASES, ids_of

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_trained_under_transfer_and_loaded_by_transformers(tmp_path, name):
    plain = hf.config_from_json(transformers.Llama4TextConfig(**CASES[name]).to_dict())
    base = BaseSizes(hidden_size=16, layers=2, expert_hidden=16, dense_hidden=16)
    torch.manual_seed(0)
    ours = Transformer(dataclasses.replace(plain, parametrization=Parametrization.transfer, base=base, init_std=0.2))
    optimizer = optim.build(ours, OptimConfig(lr=0.02))
    ids_BS = ids_of()
    before = ours.logits(ids_BS)
    for _ in range(3):
        loss = F.cross_entropy(ours.logits(ids_BS)[:, :-1].flatten(0, 1), ids_BS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    hf.save(ours, tmp_path / "model")
    theirs = transformers.Llama4ForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        logits = ours.logits(ids_BS)
        assert worst(theirs(ids_BS).logits, logits) < 1e-5
    assert (logits - before).abs().max() > 0.1
