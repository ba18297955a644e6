"""Packed samples against a packer in plain Python: labels, documents, masks, digests, counts, identity."""

import dataclasses
import json
import os
import re
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import xxhash

from distill.config.errors import DataError
from distill.config.schema import CorpusConfig, DataConfig, Source, TokenizerConfig
from distill.data import packed
from distill.data.prepare import prepare
from distill.data.tokenizer import train_tokenizer

S = 16


def corpus_file(path: Path, texts, ranges=None) -> CorpusConfig:
    rows = [{"text": text} if ranges is None else {"text": text, "m": r} for text, r in zip(texts, ranges or texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return CorpusConfig(Source.files, [str(path)], held_out=0.0, mask_key=None if ranges is None else "m")


def texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    words = ["the", "a", "cat", "dog", "sat", "ran", "over", "under", "naïve", "漢字", "(x)", "=", "5;", "\n", "return"]
    return [" ".join(rng.choice(words, rng.integers(0, 60))) for _ in range(count)]


def prepared(folder: Path, corpus: CorpusConfig, **config):
    tokenizer = TokenizerConfig(vocab_size=config.pop("vocab_size", 300), **config)
    return prepare(DataConfig({"main": corpus}, tokenizer, sample_tokens=S), folder, 1000)


def everything(corpus):
    return corpus.take(np.arange(len(corpus)))


@pytest.mark.parametrize("specials", [{}, {"bos": None}, {"bos": None, "eos": None}])
@pytest.mark.parametrize("batch_tokens", [1, 100, 1 << 17])
def test_samples_equal_those_of_a_packer_in_plain_python(tmp_path, monkeypatch, specials, batch_tokens):
    monkeypatch.setattr(packed, "BATCH_TOKENS", batch_tokens)
    documents = texts(60)
    data = prepared(tmp_path, corpus_file(tmp_path / "a.jsonl", documents), **specials)
    t, corpus = data.tokenizer, data.train["main"]

    stream = []  # (id, document, may be a label)
    for number, text in enumerate(text for text in documents if text):
        ids = [t.bos_id, *t.encode_batch([text])[0][0], t.eos_id]
        ids = [i for i in ids if i is not None]
        stream += [(i, number, place > 0) for place, i in enumerate(ids)]
    wanted = [stream[i * S : i * S + S + 1] for i in range((len(stream) - 1) // S)]

    got = everything(corpus)
    assert len(corpus) == len(wanted) > 40
    assert got.ids.tolist() == [[i for i, _, _ in sample] for sample in wanted]
    assert got.mask.tolist() == [[m for _, _, m in sample] for sample in wanted]
    assert got.documents.tolist() == [[d - sample[0][1] for _, d, _ in sample] for sample in wanted]
    for i, sample in enumerate(wanted):
        ids, documents, mask = zip(*sample)
        record = struct.pack(f"<{S + 1}i", *ids) + struct.pack(f"<{S + 1}i", *(d - documents[0] for d in documents))
        assert int(got.digests[i]) == xxhash.xxh3_64_intdigest(record + bytes(mask))
    counts = Counter(i for sample in wanted for i, _, _ in sample[1:])
    assert corpus.counts_V(1000).tolist() == [counts[i] for i in range(1000)]


def test_labels_continue_in_the_next_sample_and_never_cross_documents(tmp_path):
    got = everything(prepared(tmp_path, corpus_file(tmp_path / "a.jsonl", texts(60))).train["main"])
    assert np.array_equal(got.ids[:-1, -1], got.ids[1:, 0])
    same = got.documents[:, 1:] == got.documents[:, :-1]
    assert np.array_equal(got.mask[:, 1:], same) and not same.all()
    step = np.diff(got.documents, axis=1)
    assert (got.documents[:, 0] == 0).all() and set(np.unique(step)) == {0, 1}


def test_any_ids_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "BATCH_TOKENS", 100)
    corpus = prepared(tmp_path, corpus_file(tmp_path / "a.jsonl", texts(60))).train["main"]
    whole = everything(corpus)
    ids = np.array([7, 3, 3, len(corpus) - 1, 0, 7])
    for got, column in zip(corpus.take(ids)[:4], whole):
        assert np.array_equal(got, column[ids])
    assert len(corpus.take(np.array([], np.int64)).ids) == 0
    for wrong in (-1, len(corpus)):
        with pytest.raises(AssertionError):
            corpus.take(np.array([wrong]))


def test_character_ranges_select_the_tokens_that_touch_them(tmp_path):
    documents = ["question: two plus two? answer: four, of course"] * 40
    answer = [documents[0].index("four"), len(documents[0])]
    early = [0, 8]
    ranges = [[answer] if i % 2 else [early, [20, 20]] for i in range(40)]
    data = prepared(tmp_path, corpus_file(tmp_path / "a.jsonl", documents, ranges))
    t, got = data.tokenizer, everything(data.train["main"])
    stream = np.concatenate([got.ids[:, :-1].ravel(), got.ids[-1:, -1]])
    mask = np.concatenate([got.mask[:, :-1].ravel(), got.mask[-1:, -1]])
    number, place = -1, 0
    for i, carries in zip(stream.tolist(), mask.tolist()):
        if i == t.bos_id:
            number, place = number + 1, 0
            assert not carries
            continue
        [start, end] = answer if number % 2 else early
        if i == t.eos_id:
            assert carries == (number % 2 == 1)  # only where the text's end carries loss
            continue
        width = len(t.decode([i]))  # the text is ASCII: a character is a byte
        assert carries == (place < end and place + width > start), (number, place, t.decode([i]))
        place += width
    assert number > 30


def test_masks_land_right_behind_characters_of_many_bytes(tmp_path):
    text = "漢字🙂é" * 5 + "X" + "漢字" * 5
    at = text.index("X")
    config = corpus_file(tmp_path / "a.jsonl", [text] * 10, [[[at, at + 1]]] * 10)
    data = prepared(tmp_path, config, vocab_size=258)  # no merges: a token is a byte
    got = everything(data.train["main"])
    [(x, _)] = data.tokenizer.encode_batch(["X"])
    assert got.mask.any() and np.array_equal(got.mask, got.ids == x[0])


def test_digest_depends_on_tokens_documents_and_mask(tmp_path):
    base = ["abcd" * 10, "efgh" * 10]
    whole = [[[0, 40]], [[0, 40]]]
    seen = set()
    for i, (documents, ranges) in enumerate(
        [(base, whole), (base[::-1], whole), (base, [[[0, 39]], [[0, 40]]]), (["abcd" * 10 + "efgh" * 10], [[[0, 80]]])]
    ):
        config = corpus_file(tmp_path / f"{i}.jsonl", documents, ranges)
        data = prepared(tmp_path, config, vocab_size=256, bos=None, eos=None)
        seen.add(data.train["main"].digest)
    assert len(seen) == 4


CODE = """
import sys, numpy as np
from pathlib import Path
from distill.config.schema import CorpusConfig, DataConfig, Source, TokenizerConfig
from distill.data.prepare import prepare
corpus = CorpusConfig(Source.files, [sys.argv[2]], held_out=0.2)
data = prepare(DataConfig({"main": corpus}, TokenizerConfig(vocab_size=300), sample_tokens=16), Path(sys.argv[1]), 300)
for split in (data.train, data.held_out):
    print(len(split["main"]), split["main"].digest, split["main"].take(np.arange(9)).digests.tolist())
print(data.tokenizer.digest)
"""


def test_other_processes_and_folders_give_the_same_identities(tmp_path):
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        for i, text in enumerate(texts(200)):
            (tmp_path / name / f"{i:03}.txt").write_text(text)
    said = []
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed}
        command = [sys.executable, "-c", CODE, str(tmp_path / f"data{seed}"), str(tmp_path / seed / "*.txt")]
        said.append(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)
    assert said[0] == said[1] and len(said[0].splitlines()) == 3


def test_a_second_time_it_is_found(tmp_path, monkeypatch):
    config = corpus_file(tmp_path / "a.jsonl", texts(60))
    first = prepared(tmp_path / "data", config)
    monkeypatch.setattr("distill.data.prepare.pack", lambda *args: pytest.fail("packed again"))
    monkeypatch.setattr("distill.data.prepare.train_tokenizer", lambda *args: pytest.fail("trained again"))
    began = time.perf_counter()
    second = prepared(tmp_path / "data", config)
    assert time.perf_counter() - began < 1
    assert second.tokenizer.digest == first.tokenizer.digest
    assert second.train["main"].digest == first.train["main"].digest and second.held_out == {}
    names = sorted(path.name.split("-")[0] for path in (tmp_path / "data").iterdir())
    assert names == ["main", "tokenizer"]


def test_what_decides_the_content_decides_the_folder(tmp_path):
    config = corpus_file(tmp_path / "a.jsonl", texts(60))
    prepared(tmp_path / "data", config)
    prepared(tmp_path / "data", config, eos=None)
    prepare(DataConfig({"main": config}, TokenizerConfig(vocab_size=300), sample_tokens=8), tmp_path / "data", 300)
    (tmp_path / "a.jsonl").write_text('{"text": "something else, long enough for one sample"}\n')
    prepared(tmp_path / "data", config)
    names = [path.name.split("-")[0] for path in (tmp_path / "data").iterdir()]
    assert Counter(names) == {"main": 4, "tokenizer": 3}


def test_a_given_tokenizer_is_taken_and_a_too_large_one_refused(tmp_path):
    config = corpus_file(tmp_path / "a.jsonl", texts(60))
    own = train_tokenizer(TokenizerConfig(vocab_size=290), ["own words"] * 9 + texts(60, seed=1))
    own.save(tmp_path / "own.json")
    data = DataConfig({"main": config}, TokenizerConfig(str(tmp_path / "own.json")), sample_tokens=S)
    assert prepare(data, tmp_path / "data", own.vocab_size + 1000).tokenizer.digest == own.digest
    with pytest.raises(DataError, match=rf"own\.json has {own.vocab_size} ids; model\.vocab_size is 280"):
        prepare(data, tmp_path / "data", 280)


def test_a_mixture_keeps_the_order_of_its_corpora(tmp_path):
    corpora = {name: corpus_file(tmp_path / f"{name}.jsonl", texts(60, seed)) for seed, name in enumerate("zam")}
    corpora["a"] = dataclasses.replace(corpora["a"], held_out=0.5)
    data = prepare(DataConfig(corpora, TokenizerConfig(vocab_size=300), sample_tokens=S), tmp_path / "data", 300)
    assert list(data.train) == ["z", "a", "m"] and list(data.held_out) == ["a"]
    assert [corpus.name for corpus in data.train.values()] == ["z", "a", "m"]
    assert len({corpus.digest for corpus in data.train.values()}) == 3


def test_what_is_held_out_never_trains_the_tokenizer(tmp_path):
    train_text, held_out_text = "aaaa bbbb " * 50, "qqqq zzzz " * 50
    (tmp_path / "h.jsonl").write_text(json.dumps({"text": held_out_text}) + "\n")
    config = corpus_file(tmp_path / "a.jsonl", [train_text])
    config = dataclasses.replace(config, held_out_files=[str(tmp_path / "h.jsonl")])
    data = prepared(tmp_path / "data", config)
    lengths = [len(data.tokenizer.encode_batch([text])[0][0]) for text in (train_text, held_out_text)]
    assert lengths[0] < lengths[1] == len(held_out_text)
    assert len(data.held_out["main"]) == (len(held_out_text) + 1) // S


@pytest.mark.parametrize(
    ("documents", "held_out", "message"),
    [
        ([], 0.0, r"the train split has 0 tokens; one sample takes 17 \(data\.sample_tokens is 16\): add text"),
        (["short"], 0.0, r"the train split has \d tokens; one sample takes 17"),
        (
            ["long enough for a sample"] * 3,
            0.01,
            r"the held_out split has 0 tokens; .*raise data\.corpora\.main\.held_out",
        ),
    ],
)
def test_splits_shorter_than_one_sample(tmp_path, documents, held_out, message):
    config = dataclasses.replace(corpus_file(tmp_path / "a.jsonl", documents), held_out=held_out)
    with pytest.raises(DataError, match=message):
        prepared(tmp_path / "data", config)
    assert [path.name for path in (tmp_path / "data").glob("main*")] == []


def test_a_long_packing_says_how_fast_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("distill.config.terminal.PLAIN", 0.0)
    monkeypatch.setattr("distill.data.pack.BATCH_DOCUMENTS", 20)
    prepared(tmp_path, corpus_file(tmp_path / "a.jsonl", texts(60)))
    err = capsys.readouterr().err
    # Afterwards what was left out is named.
    number = r"\d[\d.]*[kM]?"
    line = rf"packing main +\d+ %  {number} tokens/s(  \d+ s left)?  {number} tokens\n"
    assert re.match(rf"packing main +\d+ %  {number} tokens\n({line})*packing main 100 %  {number} tokens/s", err), err
