"""Needle in a haystack with stand-ins that read the text, so that every count is known."""

import re
from types import SimpleNamespace

import pytest
import torch

from distill.config.schema import NeedleTestConfig
from student import needle_test as needle
from tests.unit.test_data_needle import FACT, prepared  # noqa: F401 (a fixture)
from tests.unit.test_student_positions import OneRank


class StubReader:
    """Answers what the text states; or, past `sees` tokens from the fact to the end, something else."""

    def __init__(self, tokenizer, sees=10**9, chunk_size=None):
        self.tokenizer, self.sees = tokenizer, sees
        self.config = SimpleNamespace(chunk_size=chunk_size)
        self.most = 0

    def generate(self, prompts, max_new_tokens, *, eos_ids):
        self.most = max(self.most, len(prompts))
        assert list(eos_ids) == []
        return [self.answer(prompt.tolist())[:max_new_tokens] for prompt in prompts]

    def answer(self, ids):
        text = self.tokenizer.decode(ids[1:])
        name = re.search(r"(\w+)$", text)[1]
        after = text.partition(f"Code {name}")[2]
        distance = len(self.tokenizer.encode_batch([after])[0][0])
        said = dict(FACT.findall(text))[name] if distance <= self.sees else "7"
        return torch.tensor(self.tokenizer.encode_batch([f" {said} {name}."])[0][0])


@pytest.fixture(autouse=True)
def read(monkeypatch):
    monkeypatch.setattr(needle, "generate", StubReader.generate)


def test_who_reads_everything_finds_everything(prepared):  # noqa: F811
    config = NeedleTestConfig([40, 150], [0.0, 0.5, 1.0], trials=7, facts=2)
    model = StubReader(prepared.tokenizer, chunk_size=64)
    found = needle.find(model, prepared.tokenizer, config, 3, 0, OneRank())
    assert model.most == 3
    assert found.trials_ND.tolist() == [[7.0] * 3] * 2 and torch.equal(found.hits_ND, found.trials_ND)
    # Texts of 40 tokens are one chunk; of 150, the first line and the middle are in another chunk than the end.
    assert found.across_ND.tolist() == [[0, 0, 0], [7, 7, 0]] and torch.equal(found.hits_across_ND, found.across_ND)
    assert needle.entries(found, config, 64, 150)["needle_accuracy_across_chunks"] == 1.0
    assert "needle_accuracy_across_chunks" not in needle.entries(found, config, 64, 40)


def test_who_sees_no_further_than_a_chunk_finds_nothing_across(prepared):  # noqa: F811
    config = NeedleTestConfig([40, 150], [0.0, 1.0], trials=5)
    found = needle.find(StubReader(prepared.tokenizer, 30, 64), prepared.tokenizer, config, 16, 0, OneRank())
    assert found.hits_ND.tolist() == [[0, 5], [0, 5]] and found.hits_across_ND.sum() == 0
    entries = needle.entries(found, config, 64, 100)
    assert entries["needle_accuracy"] == 0.5  # within 100 tokens
    grid = entries["needle"]
    assert grid["accuracy"] == [[0.0, 1.0], [0.0, 1.0]] and grid["accuracy_by_length"] == [0.5, 0.5]
    assert (grid["lengths"], grid["depths"], grid["trained_tokens"]) == ([40, 150], [0.0, 1.0], 100)
    beyond = needle.entries(found, config, None, 10)
    assert beyond.keys() == {"needle"}


def test_ranks_share_the_trials(prepared):  # noqa: F811
    config = NeedleTestConfig([60], [0.0, 1.0], trials=5, facts=2)
    alone = needle.find(StubReader(prepared.tokenizer, 30), prepared.tokenizer, config, 2, 0, OneRank())
    parts = []
    for rank in range(2):
        dist = OneRank()
        dist.rank, dist.world = rank, 2
        parts.append(needle.find(StubReader(prepared.tokenizer, 30), prepared.tokenizer, config, 2, 0, dist))
    for whole, first, second in zip(alone, *parts):
        assert torch.equal(whole, first + second)
    assert parts[0].trials_ND.tolist() == [[3, 3]] and parts[1].trials_ND.tolist() == [[2, 2]]


@pytest.mark.parametrize("seeds, same", [((0, 0), True), ((0, 1), False)])
def test_texts_are_those_of_the_seed(prepared, seeds, same):  # noqa: F811
    texts = []
    for seed in seeds:
        model = StubReader(prepared.tokenizer)
        told = []
        model.answer = lambda ids, told=told, model=model: told.append(ids) or StubReader.answer(model, ids)
        needle.find(model, prepared.tokenizer, NeedleTestConfig([50], [0.5], trials=3), 2, seed, OneRank())
        texts.append(told)
    assert (texts[0] == texts[1]) == same and len({tuple(ids) for ids in texts[0]}) == 3
