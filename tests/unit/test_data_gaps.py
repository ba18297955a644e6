"""Text that a tokenizer has no token for: never an error of the library, counted, and said once."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from distill.config.errors import DataError
from distill.config.schema import CorpusConfig, DataConfig, Source, TokenizerConfig
from distill.data.prepare import prepare
from distill.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

LETTERS = {"c": 0, "a": 1, "t": 2, "ca": 3, "cat": 4}
MERGES = [("c", "a"), ("ca", "t")]
TEXT = "caXt cat </s> XéY t"
KINDS = {
    # the model; what of TEXT it cannot encode; the ids of the rest
    "bpe": (lambda: models.BPE(LETTERS, MERGES), ["X", "X", "é", "Y"], ["cat", "cat", "</s>", "t"]),
    "bpe with a name": (
        lambda: models.BPE(LETTERS, MERGES, unk_token="<unk>"),
        ["X", "X", "é", "Y"],
        ["ca", "t", "cat", "</s>", "t"],
    ),
    "bpe with few bytes": (
        lambda: models.BPE(LETTERS | {"<0x58>": 5}, MERGES, byte_fallback=True),
        ["é", "Y"],
        ["ca", "<0x58>", "t", "cat", "</s>", "<0x58>", "t"],
    ),
    "words": (lambda: models.WordLevel({"cat": 5, "t": 9}, "<unk>"), ["caXt", "XéY"], ["cat", "</s>", "t"]),
    "pieces": (
        lambda: models.WordPiece({"ca": 0, "##t": 1, "t": 2}, unk_token="[UNK]"),
        ["caXt", "XéY"],
        ["ca", "##t", "</s>", "t"],
    ),
    "unigram": (
        lambda: models.Unigram([("c", -1.0), ("a", -2.0), ("t", -1.5)], None, False),
        ["X", "XéY"],
        ["c", "a", "t", "c", "a", "t", "</s>", "t"],
    ),
}


def record(model) -> dict:
    library = Library(model)
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens(["<s>", "</s>"])
    return json.loads(library.to_str())


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_no_token_is_found_and_the_rest_encoded(kind):
    model, missing, kept = KINDS[kind]
    data = record(model())
    tokenizer = Tokenizer(data, "<s>", "</s>", "t.json")
    texts = [TEXT, "cat cat", ""]
    for offsets in (True, False):
        [(ids, pairs), (good, _), (none, _)] = tokenizer.encode_batch(texts, offsets)
        assert [tokenizer.token(i) for i in ids] == kept and none == []
        assert (pairs is not None) == offsets
    assert [TEXT[start:end] for start, end in tokenizer.unencodable(texts)[0]] == missing
    assert tokenizer.unencodable(texts)[1:] == [[], []]
    library = Library.from_str(json.dumps(data))
    assert good == library.encode("cat cat", add_special_tokens=False).ids
    assert tokenizer.vocab_size == max(library.get_vocab().values()) + 1
    if kind in ("bpe", "bpe with few bytes"):  # the library's own ids count
        assert ids == library.encode(TEXT, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "model",
    [
        models.BPE(LETTERS | {"<unk>": 5}, MERGES, unk_token="<unk>"),
        models.WordLevel({"cat": 0, "?": 1}, "?"),
        models.Unigram([("<unk>", 0.0), ("c", -1.0)], 0, False),
        models.BPE({f"<0x{byte:02X}>": byte for byte in range(256)}, [], byte_fallback=True),
    ],
)
def test_a_tokenizer_with_an_unknown_token_or_all_bytes_leaves_nothing_out(model):
    data = record(model)
    tokenizer = Tokenizer(data, "<s>", "</s>", "t.json")
    assert tokenizer.unencodable([TEXT]) == [[]]
    assert tokenizer.encode_batch([TEXT])[0][0] == Library.from_str(json.dumps(data)).encode(TEXT).ids


def test_a_byte_level_tokenizer_leaves_nothing_out_and_is_not_run_twice():
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=300), [TEXT])
    assert tokenizer.unencodable(["Ω≈ç√ \0 🙃"]) == [[]]
    assert tokenizer._twin is None


def packed(folder: Path, data: dict, *texts: str, **config):
    if not (folder / "a.jsonl").exists():
        (folder / "t.json").write_text(json.dumps(data))
        (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = CorpusConfig(Source.files, [str(folder / "a.jsonl")], held_out=0.0, **config)
    tokenizer = TokenizerConfig(file=str(folder / "t.json"), bos="<s>", eos="</s>")
    return prepare(DataConfig({"main": corpus}, tokenizer, sample_tokens=4), folder / "data", 100)


@pytest.mark.parametrize("kind", KINDS)
def test_packing_says_once_what_it_leaves_out(tmp_path, capfd, kind):
    model, missing, _ = KINDS[kind]
    data = record(model())
    for _ in range(2):
        packed(tmp_path, data, TEXT, "cat", "", TEXT, "cat cat cat cat")
    characters = 2 * sum(map(len, missing))
    assert capfd.readouterr().err.splitlines() == [
        f"packing main: left out {characters} characters in 2 of 4 documents: {tmp_path}/t.json has no token for "
        f"{', '.join(map(repr, dict.fromkeys(missing)))} and no unknown token",
        "packing main: 1 document without text",
    ]
    [report] = (tmp_path / "data").glob("main-*/left_out.json")
    assert json.loads(report.read_text()) == {
        "empty_documents": 1,
        "unencodable_characters": characters,
        "documents_with_unencodable_characters": 2,
    }


def test_text_of_which_nothing_is_left_is_one_line(tmp_path):
    with pytest.raises(DataError, match=r"data\.corpora\.main: the train split has 4 tokens; one sample takes 5"):
        packed(tmp_path, record(models.WordLevel({"cat": 0}, "<unk>")), "dog", "dog dog dog")


def test_nothing_is_said_where_nothing_is_left_out(tmp_path, capfd):
    data = record(models.WordLevel({"cat": 0}, "<unk>"))
    packed(tmp_path, data, "cat cat cat cat")
    assert capfd.readouterr().err == ""


# ------------------------------------------------------------ what else a tokenizer.json may say


def busy(folder: Path) -> tuple[dict, dict]:
    """A plain tokenizer, and the same that cuts, fills, drops out and adds tokens of its own."""
    library = Library(models.BPE(LETTERS | {"<unk>": 5}, MERGES, unk_token="<unk>"))
    library.normalizer = normalizers.Lowercase()
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.decoder = decoders.BPEDecoder()
    library.add_special_tokens(["<s>", "</s>"])
    plain = json.loads(library.to_str())
    library.enable_truncation(3)
    library.enable_padding(length=50, pad_id=1, pad_token="a")
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[("<s>", library.token_to_id("<s>")), ("</s>", library.token_to_id("</s>"))],
    )
    full = json.loads(library.to_str())
    full["model"]["dropout"] = 0.9
    return plain, full


def test_nothing_is_cut_filled_dropped_or_added(tmp_path):
    plain, full = busy(tmp_path)
    texts = ["Cat cat CAT </s> at ca"] * 50
    want = Library.from_str(json.dumps(plain)).encode(texts[0]).ids
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "t.json").write_bytes(mark + json.dumps(full, indent=2).encode() + b"\n\n")
        tokenizer = load_tokenizer(TokenizerConfig(file=str(tmp_path / "t.json"), bos="<s>", eos="</s>"))
        for offsets in (True, False):
            assert {tuple(ids) for ids, _ in tokenizer.encode_batch(texts, offsets)} == {tuple(want)}
    assert len(want) == 7


def test_missing_special_tokens_are_named_both_at_once_with_those_that_are_there(tmp_path):
    (tmp_path / "t.json").write_text(json.dumps(record(models.WordLevel({"a": 0}, "<unk>"))))
    with pytest.raises(DataError) as caught:
        load_tokenizer(TokenizerConfig(file=str(tmp_path / "t.json")))
    bos, eos = str(caught.value).splitlines()
    for line, role, token in ((bos, "bos", "<|begin_of_text|>"), (eos, "eos", "<|end_of_text|>")):
        assert f"t.json: has no token '{token}' (data.tokenizer.{role}); name one that it has, or null" in line
        assert line.endswith("its special tokens: '<s>', '</s>'")


def test_a_pointer_of_git_lfs_is_no_tokenizer(tmp_path):
    (tmp_path / "t.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(DataError, match=r"t\.json; is a pointer of Git LFS"):
        load_tokenizer(TokenizerConfig(file=str(tmp_path / "t.json")))


def test_an_added_token_with_the_id_of_a_word_is_refused():
    with pytest.raises(DataError, match=r"t\.json: 3 is the id of 'cat' and, as an added token, of '</s>'; number"):
        Tokenizer(record(models.WordLevel({"cat": 3, "t": 9}, "<unk>")), "<s>", "</s>", "t.json")


def test_added_tokens_and_holes_decide_the_size_of_the_vocabulary(tmp_path):
    data = record(models.WordLevel({"cat": 0, "far": 50}, "<unk>"))
    (tmp_path / "t.json").write_text(json.dumps(data))
    ids = Library.from_str(json.dumps(data)).get_vocab().values()
    tokenizer = load_tokenizer(TokenizerConfig(file=str(tmp_path / "t.json"), bos="<s>", eos="</s>"))
    assert tokenizer.vocab_size == max(ids) + 1 == 51
    (tmp_path / "a.txt").write_text("cat " * 20)
    config = DataConfig(
        {"main": CorpusConfig(Source.files, [str(tmp_path / "a.txt")], held_out=0.0)},
        TokenizerConfig(file=str(tmp_path / "t.json"), bos="<s>", eos="</s>"),
        sample_tokens=4,
    )
    with pytest.raises(DataError, match=r"t\.json has 51 ids; model\.vocab_size is 50, at least as many are needed"):
        prepare(config, tmp_path / "data", 50)
    assert len(prepare(config, tmp_path / "data", 51).train["main"]) == 5
