"""Greedy generation against transformers' cached decoding."""

import pytest
import torch

from distill.model import hf
from distill.model.decode import generate
from tests.parity.test_hf_text import CASES, saved


@pytest.mark.parametrize("name", ["scout", "maverick", "mixed"])
@pytest.mark.parametrize("length", [5, 8, 15, 21])
def test_greedy_ids_are_those_of_transformers(tmp_path, name, length):
    theirs = saved(tmp_path, CASES[name])
    ours = hf.load(tmp_path)
    prompts_BS = torch.randint(3, 97, (3, length), generator=torch.Generator().manual_seed(length))
    # Rows alone: transformers pads the left of shorter ones, and counts the padding as positions.
    expected = [
        theirs.generate(row[None], max_new_tokens=30, do_sample=False, eos_token_id=2, pad_token_id=0)[0, length:]
        for row in prompts_BS
    ]
    found = generate(ours, list(prompts_BS), 30)
    assert [row.tolist() for row in found] == [row.tolist() for row in expected]
    assert len(set(torch.cat(found).tolist())) > 10  # it is no loop over one id
