"""JSON as people write it: on lines, in arrays, spread out, and broken in one place, which is named by its line."""

import gzip
import json

import pytest

from distill.config.errors import DataError
from distill.data import json_rows
from tests.unit.test_data_files import LINES, TEXTS, texts, write, zstd


def test_text_that_looks_like_something_else_stays_text(tmp_path):
    for look in ("2024-01-01", "2024-01-01T00:00:00Z", "12", "1e5", "true", "null", "NaN", "0042", "", " x "):
        path = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": look}) + "\n" for _ in range(3)))
        assert texts(path) == ([look] * 3 if look else [])


@pytest.mark.parametrize("value", ["12", "1.5", "true", "null", "NaN", "-Infinity", "1e999", '["a"]', '{"a": 1}'])
def test_what_is_no_text_is_refused_by_row(tmp_path, value):
    path = write(tmp_path / "a.jsonl", f'{{"text": "a"}}\n\n{{"text": "b"}}\r\n{{"text": {value}}}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, row 4: column 'text' is .*; a text is needed"):
        texts(path)


def test_shapes_of_json(tmp_path):
    rows = [{"text": text, "more": {"a": [1, {"b": None}]}, "score": float("nan")} for text in TEXTS]
    for name, content in {
        "bom.jsonl": b"\xef\xbb\xbf" + LINES,
        "joined.jsonl": b"\xef\xbb\xbf" + LINES[: LINES.index(b"\n") + 1] + b"\xef\xbb\xbf" + LINES.split(b"\n", 1)[1],
        "crlf.jsonl": LINES.replace(b"\n", b"\r\n"),
        "blank.jsonl": b"\n \n" + LINES.replace(b"\n", b"\n\n\t\n"),
        "no_end.jsonl": LINES.rstrip(),
        "raw.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode(),
        "lines.json": LINES,
        "array.json": json.dumps(rows).encode(),
        "array.jsonl": json.dumps(rows).encode(),
        "pretty.json": b"\xef\xbb\xbf" + json.dumps(rows, indent=4).encode() + b"\n",
        "pretty_objects.json": "\n".join(json.dumps(row, indent=4) for row in rows).encode(),
    }.items():
        assert texts(write(tmp_path / name, content)) == TEXTS, name
    assert texts(write(tmp_path / "one.json", json.dumps(rows[0], indent=2))) == TEXTS[:1]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 100])
def test_blocks_end_anywhere(tmp_path, monkeypatch, block):
    monkeypatch.setattr(json_rows, "BLOCK", block)
    row = '{"text": "\\ud83d\\ude42🙂 \\u00e9é", "a": [true, false, null, -1.5e-3, NaN, -Infinity, {}]}'
    for name, content in {"a.jsonl": f"\ufeff{row}\r\n\n{row}\n", "a.json": f"[ {row} ,\n{row} ]\n"}.items():
        assert texts(write(tmp_path / name, content)) == ["🙂🙂 éé"] * 2
    path = write(tmp_path / "b.jsonl", f'{row}\n\n{row}\n{{"text": "a", "b": tru}}\n{row}\n')
    with pytest.raises(DataError, match="row 4: Expecting value at 't"):
        texts(path)


def test_lines_longer_than_a_block_are_read_in_linear_time(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "BLOCK", 64)
    long = "é" * 500_000
    calls = []
    decode = json.JSONDecoder.raw_decode
    monkeypatch.setattr(json.JSONDecoder, "raw_decode", lambda *a: calls.append(1) or decode(*a))
    assert texts(write(tmp_path / "a.jsonl", json.dumps({"text": long}) + '\n{"text": "b"}\n')) == [long, "b"]
    assert len(calls) < 30


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "Expecting ',' delimiter at '"),
        ('{"text": "a', "Invalid control character at '"),
        ('{"text": "a"},', "Expecting value at ',"),
        ('{"text": "a"} x', "Expecting value at 'x"),
        ('{"text": "a",}', "at ',}|at '}"),
        ("{'text': 'a'}", "Expecting property name enclosed in double quotes at "),
        ('{"text": "a", "text": "b"}', "'text' more than once"),
        ('"a"', '\'"a"\\\\n.* is no object'),
        ("[1]", r"'\[1\]\\n.* is no object"),
        ("\0\0\0\0", "Expecting value at "),
        ('{"text": "caf\xe9"}'.encode("latin-1"), "byte 0xE9 is not utf-8"),
        ('{"n": ' + "1" * 5000 + "}", "limit"),
        ('{"n": ' + "[" * 200_000, "recursion"),
    ],
)
@pytest.mark.parametrize("before", [6, 20_000])
def test_broken_lines_are_counted_from_the_start_of_the_file(tmp_path, monkeypatch, line, message, before):
    monkeypatch.setattr(json_rows, "BLOCK", 4096)
    good = b'{"text": "good"}\n'
    line = line if isinstance(line, bytes) else line.encode()
    content = good * (before // 2) + b"\n" + good * (before // 2) + line + b"\n" + good * 3
    for name, pack in (("a.jsonl", bytes), ("b.jsonl.gz", gzip.compress), ("c.json.zst", zstd)):
        with pytest.raises(
            DataError, match=rf"{name}: cannot be read as json: row {before + 2}: .*(?:{message})"
        ) as caught:
            texts(write(tmp_path / name, pack(content)))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"},\n\n{"text": 5}]', ", row 2: column 'text' is 5"),
        ('[{"text": "a"}, {"text": "b"},]', "row 3: Expecting value at ']'"),
        ('[{"text": "a"} {"text": "b"}]', "row 2: Expecting ',' at '{"),
        ('[{"text": "a"}, {"text": "b"}', "row 3: the array has no end"),
        ('[{"text": "a"}] {"text": "b"}', "row 2: '{.* after the end of the array"),
        ('[{"text": "a"}, "b"]', "row 2: '\"b\"]' is no object"),
    ],
)
def test_rows_of_an_array_are_its_objects(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        texts(write(tmp_path / "a.json", content))


def test_half_a_surrogate_pair_and_nul_in_a_text(tmp_path):
    assert texts(write(tmp_path / "a.jsonl", '{"text": "a\\u0000b"}\n')) == ["a\0b"]
    with pytest.raises(DataError, match=r"a\.jsonl, row 2: column 'text' is not valid Unicode: surrogates not allowed"):
        texts(write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": "\\ud800"}\n'))
    utf16 = '{"text": "a"}\n'.encode("utf-16")
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read as json: row 1: byte 0xFF is not utf-8"):
        texts(write(tmp_path / "a.jsonl", utf16))


def test_columns_that_only_some_objects_have(tmp_path):
    rows = [{"text": str(i)} if i < 255 else {"text": str(i), "images": []} for i in range(600)]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert len(texts(path, image_key="images")) == 600
