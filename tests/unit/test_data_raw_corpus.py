"""Documents: every format gives the same text, the splits share nothing, and bad input is named."""

import gzip
import json
import os
import socket
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill.config.errors import DataError
from distill.config.schema import CorpusConfig, Source
from distill.data.raw_corpus import RawCorpus

TEXTS = [f"document {i}: naïve 漢字\nline two" for i in range(300)]


def documents(scratch: Path, *files: str | Path, **config):
    return list(RawCorpus("main", CorpusConfig(Source.files, list(map(str, files)), **config)).documents(scratch))


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# ------------------------------------------------------------ the standard library


def test_stdlib_is_split_by_file_without_overlap_tests_or_machine_dependent_files(tmp_path):
    corpus = RawCorpus("main", CorpusConfig(held_out=0.1))
    found = list(corpus.documents(tmp_path))
    assert len(found) > 300
    root = Path(sysconfig.get_path("stdlib"))
    texts = [d.text for d in found]
    assert all(texts)  # no empty package files
    inside = ("argparse.py", "ast.py", "asyncio/tasks.py", "base64.py", "json/decoder.py")
    places = [texts.index((root / name).read_text()) for name in inside]
    assert places == sorted(places)
    assert not any("class TestJSONEncode" in d.text or "build_time_vars" in d.text[:300] for d in found)
    held_out = [d for d in found if d.held_out]
    assert 0.05 < len(held_out) / len(found) < 0.15
    assert not {d.text for d in held_out} & {d.text for d in found if not d.held_out}
    assert found == list(RawCorpus("again", CorpusConfig(held_out=0.1)).documents(tmp_path))


def test_a_larger_held_out_share_only_adds(tmp_path):
    few, many = ({d.text for d in documents_of(share, tmp_path) if d.held_out} for share in (0.05, 0.2))
    assert few < many
    assert not any(d.held_out for d in documents_of(0.0, tmp_path))


def documents_of(held_out: float, scratch: Path):
    return RawCorpus("main", CorpusConfig(held_out=held_out)).documents(scratch)


def test_max_documents_takes_the_first(tmp_path):
    whole = RawCorpus("main", CorpusConfig(held_out=0.5)).documents(tmp_path)
    some = list(RawCorpus("main", CorpusConfig(held_out=0.5, max_documents=40)).documents(tmp_path))
    assert some == [next(whole) for _ in some] and 20 < len(some) <= 40  # empty files count and give no document


# ------------------------------------------------------------ files


def test_every_format_gives_the_same_documents(tmp_path):
    table = pa.table({"other": range(len(TEXTS)), "text": TEXTS})
    rows = [{"other": i, "text": text} for i, text in enumerate(TEXTS)]
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=77)
    with pa.ipc.new_file(tmp_path / "file.arrow", table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as writer:
        writer.write_table(table)
    paths = [
        write(tmp_path / "a.jsonl", jsonl(rows)),
        write(tmp_path / "a.json", json.dumps(rows)),
        write(tmp_path / "a.jsonl.gz", gzip.compress(jsonl(rows).encode())),
        *(tmp_path / name for name in ("a.parquet", "file.arrow", "stream.arrow")),
    ]
    first = documents(tmp_path, paths[0])
    assert [d.text for d in first] == TEXTS
    assert 1 <= sum(d.held_out for d in first) <= 40
    for path in paths[1:]:
        assert documents(tmp_path, path) == first, path
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(TEXTS[:20]):
        write(tmp_path / "texts" / f"{i:03}.txt", text)
    assert documents(tmp_path, tmp_path / "texts" / "*.txt") == first[:20]


def test_files_come_in_the_order_of_patterns_and_none_twice(tmp_path):
    for name in ("b.txt", "a.txt", "c.md", "[1].txt"):
        write(tmp_path / name, name)
    found = documents(tmp_path, tmp_path / "c.md", tmp_path / "[1].txt", tmp_path / "*.txt", tmp_path / "a.txt")
    assert [d.text for d in found] == ["c.md", "[1].txt", "a.txt", "b.txt"]
    write(tmp_path / "sub[2].jsonl", '{"text": "in brackets"}\n')
    assert [d.text for d in documents(tmp_path, tmp_path / "sub[[]2].jsonl")] == ["in brackets"]


def test_equal_texts_stand_on_one_side_of_the_split(tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl({"text": f"t{i % 500}"} for i in range(1000)))
    found = documents(tmp_path, path, held_out=0.3)
    sides = {d.text: set() for d in found}
    for d in found:
        sides[d.text].add(d.held_out)
    assert all(len(side) == 1 for side in sides.values())
    assert 0.25 < sum(side == {True} for side in sides.values()) / 500 < 0.35


def test_held_out_files_are_all_that_is_held_out(tmp_path):
    train = write(tmp_path / "train.jsonl", jsonl({"text": f"t{i}"} for i in range(50)))
    held_out = write(tmp_path / "val.jsonl", jsonl({"text": f"v{i}"} for i in range(5)))
    found = documents(tmp_path, train, held_out_files=[str(held_out)], held_out=0.5, max_documents=7)
    assert [d.text for d in found if not d.held_out] == [f"t{i}" for i in range(7)]
    assert [d.text for d in found if d.held_out] == [f"v{i}" for i in range(5)]
    with pytest.raises(DataError, match=r"val\.jsonl is in files and in held_out_files"):
        documents(tmp_path, tmp_path / "*.jsonl", held_out_files=[str(held_out)])


def test_the_limit_on_documents_goes_over_files(tmp_path):
    for name in "abc":
        write(tmp_path / f"{name}.jsonl", jsonl({"text": f"{name}{i}"} for i in range(5)))
    found = documents(tmp_path, tmp_path / "*.jsonl", max_documents=7)
    assert [d.text for d in found] == ["a0", "a1", "a2", "a3", "a4", "b0", "b1"]


def test_identity_changes_with_what_decides_the_documents(tmp_path):
    path = write(tmp_path / "a.txt", "text")
    plain = CorpusConfig(Source.files, [str(path)])
    same = CorpusConfig(Source.files, [str(path)], weight=3.0)
    assert RawCorpus("a", plain).identity == RawCorpus("b", same).identity
    seen = {RawCorpus("a", plain).identity}
    for change in ({"held_out": 0.1}, {"text_key": "t"}, {"mask_key": "m"}, {"max_documents": 3}):
        seen.add(RawCorpus("a", CorpusConfig(Source.files, [str(path)], **change)).identity)
    write(path, "texts")
    seen.add(RawCorpus("a", plain).identity)
    assert len(seen) == 6


def test_nothing_leaves_the_machine_or_touches_the_home_folder(tmp_path, monkeypatch):
    calls = []  # the library swallows what these raise

    def refuse(*args, **kwargs):
        calls.append(args)
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    before = sorted(cache.rglob("*")) if cache.exists() else None
    documents(tmp_path, write(tmp_path / "a.jsonl", jsonl({"text": "x"} for _ in range(3))))
    assert not calls
    assert before == (sorted(cache.rglob("*")) if cache.exists() else None)


# ------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": broken\n', r"a\.jsonl: cannot be read as json: row 2: Expecting value"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl: cannot be read as json: row 1: .*0xFF is not utf-8"),
        (
            "a.jsonl",
            '{"txt": "a"}\n',
            r"a\.jsonl: has no column 'text' \(data\.corpora\.main\.text_key\); it has 'txt'",
        ),
        ("a.jsonl", '{"text": "a"}\n{"txt": "b"}\n', r"a\.jsonl, row 2: column 'text' is None; a text is needed"),
        ("a.jsonl", '{"text": "a"}\n{"text": 5}\n', r"a\.jsonl, row 2: column 'text' is 5; a text is needed"),
        ("a.jsonl", '{"text": ["a"]}\n', r"a\.jsonl, row 1: column 'text' is \['a'\]; a text is needed"),
        ("a.parquet", "hello", r"a\.parquet: cannot be read as parquet: .*5 bytes"),
        ("a.arrow", "hello", r"a\.arrow: cannot be read as arrow: "),
        ("a.txt", b"\xff\xfe", r"a\.txt: not text in UTF-8: .*allowed: \.jsonl, .*\.parquet"),
        ("a.md", b"a\0b", r"a\.md: not text: it holds NUL"),
    ],
)
def test_files_that_are_not_what_they_say(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message) as caught:
        documents(tmp_path, write(tmp_path / name, content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ranges", [[[0, 9]], [[-1, 2]], [[2, 1]], ["x"], [[0, 1.5]], [[1]], 3, None])
def test_ranges_outside_the_text(tmp_path, ranges):
    path = write(tmp_path / "a.jsonl", jsonl([{"text": "abc", "m": ranges}]))
    with pytest.raises(DataError, match=r"a\.jsonl, row 1: column 'm' (is|has) .*0 <= start <= end <= 3"):
        documents(tmp_path, path, mask_key="m")


def test_names_that_lead_nowhere(tmp_path):
    with pytest.raises(DataError, match=r"data\.corpora\.main\.files has '.*nope\*'; no file matches"):
        documents(tmp_path, tmp_path / "nope*")
    with pytest.raises(DataError, match=r"mask_key is 'm'; .*a\.txt is text and has no columns"):
        documents(tmp_path, write(tmp_path / "a.txt", "text"), mask_key="m")
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n')
    with pytest.raises(DataError, match=r"has no column 'm' \(data\.corpora\.main\.mask_key\)"):
        documents(tmp_path, path, mask_key="m")


def test_files_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr("distill.data.tables._json", refuse)
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\n')
        with pytest.raises(DataError, match=rf"{name}: cannot be read: Permission denied"):
            documents(tmp_path, tmp_path / name)
