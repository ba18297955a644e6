"""Tokenizers: lossless, deterministic across processes, and refused with the file and token named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import distill
from distill.config.errors import ConfigError, DataError
from distill.config.schema import TokenizerConfig
from distill.data.tokenizer import load_tokenizer, train_tokenizer

TEXTS = ["the cat sat on the mat, the cat sat", "naïve café — 漢字 🙂\n\n\tdef f(x):\n    return x\n"] * 20


def test_every_text_survives_a_round_trip():
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=300), TEXTS)
    unseen = "Ω≈ç√ \x00\x7f 🙃 the cat\r\n"
    [(ids, _)] = tokenizer.encode_batch([unseen])
    assert tokenizer.decode(ids) == unseen


def test_offsets_are_the_characters_of_each_token():
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=300), TEXTS)
    text = "  the cat sat\n  on"
    [(ids, offsets)] = tokenizer.encode_batch([text])
    assert [text[start:end] for start, end in offsets] == [tokenizer.decode([i]) for i in ids]
    [(fast, none)] = tokenizer.encode_batch([text], offsets=False)
    assert fast == ids and none is None


def test_special_tokens_are_ids_of_their_own_and_nothing_is_added():
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=300), TEXTS)
    [(ids, _)] = tokenizer.encode_batch(["a<|end_of_text|>b"])
    assert ids.count(tokenizer.eos_id) == 1 and tokenizer.bos_id not in ids
    assert tokenizer.bos_id != tokenizer.eos_id
    none = train_tokenizer(TokenizerConfig(vocab_size=300, bos=None, eos=None), TEXTS)
    assert none.bos_id is None and none.eos_id is None


def test_a_file_loads_as_what_was_saved_whatever_its_layout(tmp_path):
    config = TokenizerConfig(vocab_size=300)
    trained = train_tokenizer(config, TEXTS)
    trained.save(tmp_path / "a.json")
    record = json.loads((tmp_path / "a.json").read_text())
    (tmp_path / "b.json").write_text(json.dumps(dict(reversed(record.items())), indent=3))
    for name in ("a.json", "b.json"):
        loaded = load_tokenizer(TokenizerConfig(file=str(tmp_path / name)))
        assert loaded.digest == trained.digest
        assert loaded.vocab_size == trained.vocab_size <= 300
        assert loaded.encode_batch(TEXTS) == trained.encode_batch(TEXTS)
    other = train_tokenizer(config, [*TEXTS, "zebra " * 200])
    assert other.digest != trained.digest


def test_post_processor_truncation_and_padding_of_a_file_change_nothing(tmp_path):
    trained = train_tokenizer(TokenizerConfig(vocab_size=300), TEXTS)
    trained.save(tmp_path / "plain.json")
    record = json.loads((tmp_path / "plain.json").read_text())
    record["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    record["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "busy.json").write_text(json.dumps(record))
    busy = load_tokenizer(TokenizerConfig(file=str(tmp_path / "busy.json")))
    assert busy.encode_batch(TEXTS) == trained.encode_batch(TEXTS)
    assert busy.digest != trained.digest


def test_the_vocabulary_is_the_largest_id_not_the_number_of_tokens(tmp_path):
    trained = train_tokenizer(TokenizerConfig(vocab_size=300), TEXTS)
    trained.save(tmp_path / "t.json")
    record = json.loads((tmp_path / "t.json").read_text())
    record["model"]["vocab"]["far"] = 4999
    (tmp_path / "t.json").write_text(json.dumps(record))
    assert load_tokenizer(TokenizerConfig(file=str(tmp_path / "t.json"))).vocab_size == 5000


def test_training_gives_the_same_bytes_in_every_process(tmp_path):
    code = (
        "import sys; from distill.config.schema import TokenizerConfig;"
        "from distill.data.tokenizer import train_tokenizer;"
        "texts = [open(p).read() for p in sys.argv[2:]];"
        "train_tokenizer(TokenizerConfig(vocab_size=600), texts).save(sys.argv[1])"
    )
    sources = [str(p) for p in sorted(Path(distill.__file__).parent.rglob("*.py"))[:12]]
    for name, threads in (("1", "1"), ("2", "4")):
        env = {**os.environ, "PYTHONHASHSEED": name, "RAYON_NUM_THREADS": threads}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name), *sources], env=env, check=True)
    first = (tmp_path / "1").read_bytes()
    assert len(json.loads(first)["model"]["vocab"]) == 600
    assert first == (tmp_path / "2").read_bytes()


def test_bad_tokenizers_are_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.json; cannot be read: No such file"):
        load_tokenizer(TokenizerConfig(file=str(tmp_path / "nowhere.json")))
    for name, content in (("text.json", "hello"), ("list.json", "[1]"), ("other.json", '{"a": 1}')):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=rf"{name}.*not a tokenizer\.json"):
            load_tokenizer(TokenizerConfig(file=str(tmp_path / name)))
    train_tokenizer(TokenizerConfig(vocab_size=300), TEXTS).save(tmp_path / "good.json")
    with pytest.raises(DataError, match=r"good\.json: has no token '<eot>' \(data\.tokenizer\.eos\)"):
        load_tokenizer(TokenizerConfig(file=str(tmp_path / "good.json"), eos="<eot>"))
    with pytest.raises(ConfigError, match="vocab_size is 257; at least 258"):
        train_tokenizer(TokenizerConfig(vocab_size=257), TEXTS)
