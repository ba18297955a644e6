"""Made-up documents and tests of retrieval, read back with regular expressions; documents that are kept whole."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.config.errors import DataError
from distill.config.schema import CorpusConfig, DataConfig, NeedleConfig, Source, TokenizerConfig
from distill.data.needle import document, trial
from distill.data.prepare import prepare

FACT = re.compile(r"^Code (\w+) (\d+) \1\.$", re.M)
QUESTION = re.compile(r"^Find (\w+) (\d+) \1\.$", re.M)
PIECE = re.compile(r"\w+|[.?\n]")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    needle = NeedleConfig(longest=100)
    corpus = CorpusConfig(Source.needle, max_documents=3000, held_out=0.1, whole_documents=True, needle=needle)
    tokenizer = TokenizerConfig(vocab_size=640)
    return prepare(DataConfig({"main": corpus}, tokenizer, sample_tokens=128), tmp_path_factory.mktemp("data"), 640)


@settings(max_examples=100)
@given(
    shortest=st.integers(12, 100),
    more=st.integers(0, 200),
    facts=st.integers(1, 12),
    index=st.integers(0, 10**6),
)
def test_every_answer_is_stated_once_above_and_marked(shortest, more, facts, index):
    config = NeedleConfig(shortest, shortest + more, facts)
    text, ranges = document(config, index)
    stated, asked = FACT.findall(text), QUESTION.findall(text)
    assert 1 <= len(stated) <= facts and len(asked) >= 1
    assert len({name for name, _ in stated}) == len(stated)
    assert all(question in stated for question in asked)
    assert text.rindex("Code") < text.index("Find")
    names, answers = [f" {name}" for name, _ in stated], [f" {number} {name}" for name, number in asked]
    assert [text[start:end] for start, end in ranges] == names + answers
    assert all(text[end:].startswith(".\n") for _, end in ranges)
    pieces = len(PIECE.findall(text))
    assert shortest - 5 <= pieces <= shortest + more  # questions come in whole lines
    assert document(config, index) == (text, ranges)
    assert document(config, index + 1)[0] != text


def test_documents_ask_for_any_fact_and_facts_lie_anywhere():
    places, asked_for = [], []
    for index in range(300):
        text, _ = document(NeedleConfig(200, 200, 4), index)
        facts = FACT.findall(text)
        if len(facts) == 4:
            asked_for += [facts.index(question) for question in QUESTION.findall(text)]
        if "The " in text:
            places += [m.start() / text.index("Find") for m in FACT.finditer(text)]
    assert np.histogram(places, 5, (0, 1))[0].min() > 0.1 * len(places)
    assert np.bincount(asked_for).min() > 0.22 * len(asked_for) > 100


def test_another_seed_is_another_corpus():
    assert document(NeedleConfig(seed=1), 0) != document(NeedleConfig(seed=2), 0)


# ---------------------------------------------------------------- the test


@pytest.mark.parametrize("length", [64, 65, 70, 128, 333])
@pytest.mark.parametrize("facts", [1, 4])
def test_a_trial_has_its_length_and_the_answer_where_it_says(prepared, length, facts):
    tokenizer, ends = prepared.tokenizer, []
    for depth in (0.0, 0.3, 1.0):
        prompt, answer, stated = trial(tokenizer, length, depth, facts, (0, length, depth))
        assert len(prompt) + len(answer) == length and prompt[0] == tokenizer.bos_id
        text = tokenizer.decode(prompt[1:])
        found = dict(FACT.findall(text))
        assert len(found) == facts
        name = re.search(r"Find (\w+)$", text)[1]
        assert tokenizer.decode(answer) == f" {found[name]}"
        assert tokenizer.decode(prompt[: stated + 1]).endswith(f"Code {name} {found[name]} {name}.\n")
        hay = text.replace(f"Code {name} {found[name]} {name}.\n", "\0").partition("Find")[0]
        ends.append(hay.index("\0") / (len(hay) - 1))
    assert ends[0] == 0 and ends[2] == 1
    assert abs(ends[1] - 0.3) < 60 / len(hay) + 0.1  # a line of filler at most off
    # What is built of pieces is what the tokenizer makes of the whole.
    assert tokenizer.encode_batch([text])[0][0] == prompt[1:]


def test_trials_differ_by_seed_and_repeat(prepared):
    one = trial(prepared.tokenizer, 100, 0.5, 2, (0, 1))
    assert one == trial(prepared.tokenizer, 100, 0.5, 2, (0, 1)) != trial(prepared.tokenizer, 100, 0.5, 2, (0, 2))


def test_a_length_without_room_is_named(prepared):
    with pytest.raises(
        DataError, match=r"evaluate.needle.lengths has 20; 4 facts and a question alone are \d\d tokens"
    ):
        trial(prepared.tokenizer, 20, 0.5, 4, (0,))


# ---------------------------------------------------------------- the corpus


def test_the_corpus_is_split_masked_and_whole(prepared):
    t = prepared.tokenizer
    texts = {}
    for split, corpus in (("train", prepared.train["main"]), ("held_out", prepared.held_out["main"])):
        samples = corpus.take(np.arange(len(corpus)))
        texts[split] = set()
        for ids, ordinals, mask in zip(samples.ids[:, :-1], samples.documents[:, :-1], samples.mask[:, :-1]):
            for ordinal in np.unique(ordinals):
                mine = ordinals == ordinal
                if ids[mine][0] != t.bos_id:
                    assert (ids[mine] == t.eos_id).all() and not mask[mine].any()
                    continue
                text = t.decode([i for i in ids[mine][1:] if i != t.eos_id])  # eos may be the sample's last label
                assert QUESTION.search(text) and text.endswith(".\n")
                texts[split].add(text)
                marked = "".join(t.decode([i]) for i in ids[mine][mask[mine]]).removesuffix("<|end_of_text|>")
                stated, asked = FACT.findall(text), QUESTION.findall(text)
                assert marked == "".join([f" {n}" for n, _ in stated] + [f" {u} {n}" for n, u in asked])
    assert not texts["train"] & texts["held_out"]
    assert len(texts["train"]) + len(texts["held_out"]) > 2900 and 200 < len(texts["held_out"]) < 400
