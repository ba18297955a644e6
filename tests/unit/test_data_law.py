"""The made-up language: a law that is one, text that follows it, and excess loss that is zero for the law itself."""

import dataclasses
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from distill.config.errors import ConfigError, DataError
from distill.config.load import resolve
from distill.config.schema import CorpusConfig, DataConfig, LawConfig, OnMissing, Source, TokenizerConfig
from distill.data.join import Joiner
from distill.data.law import Alphabet, Contexts, Law
from distill.data.prepare import prepare
from distill.data.raw_corpus import RawCorpus
from distill.engine.dist import Dist
from student.excess import excess

CONFIGS = [LawConfig(8, 65, 2, 1.5, 14, 3), LawConfig(5, 40, 1, 0.5, 9), LawConfig(4, 100, 3, 1.0, 20, 1, 7)]
SMALL = LawConfig(6, 65, 2, 1.0, length=14)


def texts(config, count):
    return list(Law(config).documents(count))


def slow_logprobs(law, text):
    """Of every symbol of a text after its first, by a loop over symbols in plain Python."""
    c = law.config
    numbers = [ord(character) - c.first for character in text]
    found = []
    for place in range(1, len(numbers)):
        logits = []
        for symbol in range(c.symbols):
            value = float(law._common_N[symbol]) + float(law._topics[numbers[0], symbol])
            for k in range(1, c.order + 1):
                row = 0
                for back in range(1, k + 1):
                    row = row * (c.symbols + 1) + (numbers[place - back] if place >= back else c.symbols)
                value += float(law._tables[k - 1][row, symbol])
            logits.append(value)
        total = math.log(math.fsum(map(math.exp, logits)))
        found.append([value - total for value in logits])
    return np.array(found)


def contexts_of(config, text):
    numbers = [ord(character) - config.first for character in text]
    padded = [config.symbols] * config.order + numbers
    before = [padded[place : place + config.order][::-1] for place in range(1, len(numbers))]
    return Contexts(np.full(len(before), numbers[0]), np.array(before))


@pytest.mark.parametrize("config", CONFIGS)
def test_log_probabilities_are_those_of_a_slow_loop_and_sum_to_one(config):
    law = Law(config)
    for text in texts(config, 5):
        assert len(text) == config.length
        fast_TN = law.logprobs(contexts_of(config, text))
        np.testing.assert_allclose(fast_TN, slow_logprobs(law, text), atol=1e-12)
        np.testing.assert_allclose(np.exp(fast_TN).sum(-1), 1.0, atol=1e-12)


@pytest.mark.parametrize("config", [dataclasses.replace(CONFIGS[0], length=20), CONFIGS[1]])
def test_sampled_frequencies_are_those_of_the_law(config):
    """Chi-square over all contexts with enough text: its degrees of freedom, within five standard deviations."""
    law, counts, rows = Law(config), defaultdict(Counter), {}
    for text in texts(config, 4000):
        contexts = contexts_of(config, text)
        for place, (topic, before) in enumerate(zip(contexts.topic_T, contexts.before_TK), 1):
            counts[topic, *before][ord(text[place]) - config.first] += 1
    statistic, freedom = 0.0, 0
    for key, seen in counts.items():
        total = seen.total()
        shares_N = np.exp(law.logprobs(Contexts(np.array(key[:1]), np.array([key[1:]])))[0])
        common_N = shares_N * total >= 5
        if not common_N.any() or common_N.sum() < 2:
            continue
        expected = np.append(shares_N[common_N], shares_N[~common_N].sum()) * total
        observed = [seen[s] for s in np.flatnonzero(common_N)] + [sum(seen[s] for s in np.flatnonzero(~common_N))]
        if expected[-1] < 5:
            expected, observed = expected[:-1], observed[:-1]
            expected *= sum(observed) / expected.sum()
        statistic += ((np.array(observed) - expected) ** 2 / expected).sum()
        freedom += len(observed) - 1
        rows[key] = total
    assert len(rows) > 20 and abs(statistic - freedom) < 5 * math.sqrt(2 * freedom), (statistic, freedom)


def test_documents_do_not_depend_on_their_number_but_on_every_option():
    assert texts(SMALL, 600)[:5] == texts(SMALL, 5)
    others = {"symbols": 7, "first": 66, "order": 1, "strength": 1.1, "length": 15, "seed": 1, "draw": 1}
    assert others.keys() == {field.name for field in dataclasses.fields(SMALL)}

    def identity(law):
        return RawCorpus("main", CorpusConfig(Source.law, max_documents=9, law=law)).identity

    for name, value in others.items():
        other = dataclasses.replace(SMALL, **{name: value})
        assert texts(other, 3) != texts(SMALL, 3), name
        assert identity(other) != identity(SMALL), name
    redrawn = dataclasses.replace(SMALL, draw=1)
    np.testing.assert_array_equal(Law(redrawn)._tables[1], Law(SMALL)._tables[1])


# ---------------------------------------------------------------- excess loss


class Knows(torch.nn.Module):
    """A model whose logits are the law's, or uniform, plus a constant; they are looked up by position in the sample."""

    def __init__(self, config, tokenizer, sharpness=1.0):
        super().__init__()
        self.law, self.alphabet, self.config, self.sharpness = (
            Law(config),
            Alphabet(config, tokenizer),
            config,
            sharpness,
        )
        self.size, self.bos_id = tokenizer.vocab_size + 4, tokenizer.bos_id

    def forward(self, ids_BS, documents_BS, head_fn, images):
        """The symbols before a token are collected by a loop over the sample."""
        logits_TV = torch.full((ids_BS.numel(), self.size), -50.0, dtype=torch.float64)
        number = {int(token): symbol for symbol, token in enumerate(self.alphabet.ids_N)}
        row = 0
        for sample in ids_BS.tolist():
            text = []
            for token in sample:
                text = [] if token == self.bos_id else [*text, number.get(token)]
                if text and None not in text:
                    before = [*text[::-1], *[self.config.symbols] * self.config.order][: self.config.order]
                    logprobs_N = self.law.logprobs(Contexts(np.array(text[:1]), np.array([before])))[0]
                    logits_TV[row, self.alphabet.ids_N] = torch.from_numpy(logprobs_N) * self.sharpness
                row += 1
        return head_fn(logits_TV, torch.eye(self.size, dtype=torch.float64)), None


def packed(config, folder, sample_tokens=16, **corpus):
    data = CorpusConfig(Source.law, max_documents=300, held_out=0.2, law=config, **corpus)
    return prepare(DataConfig({"main": data}, TokenizerConfig(vocab_size=258), sample_tokens), folder, 264)


def measured(prepared, config, sharpness=1.0):
    corpus = prepared.held_out["main"]
    joiner = Joiner([corpus], None, OnMissing.hard)
    batches = [joiner.batch(np.zeros(len(ids), int), ids) for ids in np.array_split(np.arange(len(corpus)), 5)]
    model = Knows(config, prepared.tokenizer, sharpness)
    return excess(model, batches, ["main"], {"main": config}, prepared.tokenizer, Dist(0, 1, torch.device("cpu")))


@pytest.mark.parametrize("config", [SMALL, dataclasses.replace(SMALL, order=1, length=5)])
def test_a_model_that_is_the_law_has_no_excess(tmp_path, config):
    prepared = packed(config, tmp_path, whole_documents=True)
    found = measured(prepared, config)
    assert abs(found.excess) < 1e-6 and found.corpora == {"main": found.excess}
    # The oracle: entropies and numbers of the held-out texts themselves, by the slow loop.
    law, held_out = Law(config), []
    for document in RawCorpus("main", CorpusConfig(Source.law, max_documents=300, held_out=0.2, law=config)).documents(
        tmp_path
    ):
        held_out += [document.text] * document.held_out
    logprobs = np.concatenate([slow_logprobs(law, text) for text in held_out])
    entropy = -(np.exp(logprobs) * logprobs).sum(-1)
    dropped = found.tokens - len(entropy)  # of the last documents, which do not fill a sample
    assert -2 * config.length <= dropped <= 0
    assert found.entropy == pytest.approx(entropy[: found.tokens].mean(), abs=1e-9)
    flat = measured(prepared, config, sharpness=0.0)
    assert flat.excess == pytest.approx(math.log(config.symbols) - found.entropy, abs=1e-6)


def test_documents_that_an_earlier_sample_begins_do_not_count(tmp_path):
    """Cut anywhere, samples of 16 tokens with documents of 22: the law's context would not be in the sample."""
    config = dataclasses.replace(SMALL, length=20)
    found = measured(packed(config, tmp_path), config)
    assert abs(found.excess) < 1e-6 and found.tokens > 0


def test_a_tokenizer_with_merges_is_refused(tmp_path):
    data = CorpusConfig(Source.law, max_documents=300, law=SMALL)
    prepared = prepare(DataConfig({"main": data}, TokenizerConfig(vocab_size=300), 16), tmp_path, 300)
    with pytest.raises(DataError, match=r"one token a byte \(data.tokenizer.vocab_size=258\)"):
        Alphabet(dataclasses.replace(SMALL, symbols=94, first=33), packed_without_bos(tmp_path))
    assert len(Alphabet(SMALL, prepared.tokenizer).ids_N) == SMALL.symbols


def packed_without_bos(folder):
    data = CorpusConfig(Source.law, max_documents=300, law=SMALL)
    return prepare(DataConfig({"main": data}, TokenizerConfig(vocab_size=258, bos=None), 16), folder, 264).tokenizer


def test_broken_rules_are_named():
    law = "data.corpora.main."
    with pytest.raises(ConfigError) as caught:
        resolve(["job=teacher", f"{law}source=law", f"{law}law.first=100", f"{law}law.symbols=90", f"{law}law.order=3"])
    assert caught.value.problems == [
        f"{law}max_documents is null; source=law makes so many documents",
        f"{law}law.symbols is 90; law.first 100 leaves 27 characters",
        f"{law}law.order is 3; with 90 symbols more than 70,000 contexts",
    ]
