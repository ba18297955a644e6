"""What people call their files, how they compress them and what Parquet and Arrow hold."""

import bz2
import datetime
import gzip
import json
import lzma
import os
import random
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill.config.errors import DataError
from distill.config.schema import CorpusConfig, DataConfig, FileFormat, Source
from distill.data import json_rows
from distill.data.prepare import prepare
from distill.data.raw_corpus import RawCorpus

TEXTS = [f'text {i}: naïve 漢字 🙂 \\ "quoted"\n\tline two' for i in range(40)]
LINES = "".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(TEXTS)).encode()


def texts(*files: str | Path, **config) -> list[str]:
    scratch = Path(files[0]).parent
    corpus = RawCorpus("main", CorpusConfig(Source.files, list(map(str, files)), **config))
    return [document.text for document in corpus.documents(scratch)]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return sink.getvalue().to_pybytes()


def parquet(content: pa.Table | None = None, **options) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": TEXTS}) if content is None else content, sink, **options)
    return sink.getvalue().to_pybytes()


def arrow(table: pa.Table, new=pa.ipc.new_file, **options) -> bytes:
    sink = pa.BufferOutputStream()
    with new(sink, table.schema, **options) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


# ------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("A.JSONL", LINES),
        ("a.NdJson", LINES),
        ("a.Json", json.dumps([{"text": text} for text in TEXTS])),
        ("a.JSON.GZ", gzip.compress(LINES)),
        ("a.v1.5.jsonl.Zst", zstd(LINES)),
        ("a.jsonl.zstd", zstd(LINES)),
        ("a.jsonl.BZ2", bz2.compress(LINES)),
        ("a.jsonl.xz", lzma.compress(LINES)),
        ("a.jsonl", gzip.compress(LINES)),  # the name says less than it could
        ("a.jsonl", zstd(LINES)),
        ("A.Parquet", parquet()),
        ("a.parquet.gz", gzip.compress(parquet())),
        ("a.ARROW", arrow(pa.table({"text": TEXTS}))),
        ("a.arrow.zst", zstd(arrow(pa.table({"text": TEXTS}), pa.ipc.new_stream))),
        ("a.feather", arrow(pa.table({"text": TEXTS}), options=pa.ipc.IpcWriteOptions(compression="lz4"))),
    ],
)
def test_suffixes_in_any_case_with_any_compression(tmp_path, name, content):
    assert texts(write(tmp_path / name, content)) == TEXTS


def test_text_in_any_case_with_any_compression(tmp_path):
    for name, pack in (("a.TXT", bytes), ("a.Md.GZ", gzip.compress), ("a.rs.zst", zstd), ("a.txt", gzip.compress)):
        assert texts(write(tmp_path / name, pack(TEXTS[0].encode()))) == [TEXTS[0]]


@pytest.mark.parametrize(
    "name", ["a.jsonl.bak", "corpus", "a.dat", "a.csv", "a.TSV", "a.gz", "a.tar.gz", "a.zip", ".x"]
)
def test_a_name_that_does_not_say_what_is_in_it_is_refused_until_somebody_does(tmp_path, name):
    path = write(tmp_path / name, LINES)
    with pytest.raises(
        DataError, match=rf"files has .*{name}, whose suffix names no format.*\.parquet.*format \(text, js"
    ):
        RawCorpus("main", CorpusConfig(Source.files, [str(path)]))
    if "gz" not in name:
        assert texts(path, format=FileFormat.json) == TEXTS
        assert texts(path, format=FileFormat.text) == [LINES.decode()]


def test_all_unknown_names_are_counted_and_three_shown(tmp_path):
    for name in ("a.jsonl", "b.bak", "c.bak", "d.bak", "e.bak"):
        write(tmp_path / name, LINES)
    with pytest.raises(DataError, match=r"b\.bak, .*c\.bak, .*d\.bak and 1 more, whose"):
        texts(tmp_path / "*")


def test_what_was_read_as_text_before_is_not_found_packed_again(tmp_path):
    path = write(tmp_path / "a.jsonl", LINES)
    names = {
        RawCorpus("a", CorpusConfig(Source.files, [str(path)], format=f)).identity for f in (None, FileFormat.text)
    }
    assert len(names) == 2
    same = RawCorpus("a", CorpusConfig(Source.files, [str(path)], format=FileFormat.json)).identity
    assert same in names


def test_a_link_says_what_a_file_holds_whose_own_name_is_a_digest(tmp_path):
    blob = write(tmp_path / "5891b5b522d5df086d0ff0b110fbd9d2", LINES)
    (tmp_path / "train.jsonl").symlink_to(blob)
    (tmp_path / "again.jsonl").symlink_to(blob)
    (tmp_path / "latest").symlink_to(write(tmp_path / "b.txt", "b"))
    assert texts(tmp_path / "train.jsonl") == TEXTS
    assert texts(tmp_path / "*.jsonl") == TEXTS  # one file, once
    assert texts(tmp_path / "latest") == ["b"]


def test_folders_and_one_file_in_both_splits(tmp_path):
    path = write(tmp_path / "a.jsonl", LINES)
    (tmp_path / "sub.jsonl").mkdir()
    assert texts(tmp_path / "*.jsonl") == TEXTS  # a pattern passes over folders
    with pytest.raises(
        DataError, match=r"files has '.*sub\.jsonl'; it is a folder: name its files, '.*sub\.jsonl/\*\*"
    ):
        texts(tmp_path / "sub.jsonl")
    os.link(path, tmp_path / "hard.jsonl")
    (tmp_path / "soft.jsonl").symlink_to(path)
    for name in ("hard.jsonl", "soft.jsonl"):
        with pytest.raises(DataError, match=r"a\.jsonl is in files and in held_out_files"):
            texts(path, held_out_files=[str(tmp_path / name)])


def test_a_copy_in_the_other_split_is_refused_but_not_a_license_in_each(tmp_path):
    train = write(tmp_path / "train.jsonl", LINES)
    copy = write(tmp_path / "val.jsonl", LINES)
    with pytest.raises(
        DataError, match=r"train\.jsonl is in files and in held_out_files as .*val\.jsonl; it must be in"
    ):
        texts(train, held_out_files=[str(copy)])
    write(copy, LINES.replace(b"text 7", b"TEXT 7"))  # of equal size
    assert len(texts(train, held_out_files=[str(copy)])) == 80
    one, two = (write(tmp_path / name, "all rights") for name in ("a.txt", "b.txt"))
    assert texts(one, held_out_files=[str(two)]) == ["all rights"] * 2


def test_everything_that_is_wrong_with_names_comes_at_once(tmp_path):
    write(tmp_path / "a.bak", LINES)
    main = CorpusConfig(Source.files, [str(tmp_path / "a.bak"), str(tmp_path / "no*")], [str(tmp_path)])
    other = CorpusConfig(Source.files, [str(tmp_path / "b.jsonl")])
    with pytest.raises(DataError) as caught:
        prepare(DataConfig({"main": main, "other": other}), tmp_path / "data", 1000)
    assert [line.split(";")[0] for line in str(caught.value).splitlines()] == [
        f"data.corpora.main.held_out_files has {str(tmp_path)!r}",
        f"data.corpora.main.files has {str(tmp_path / 'no*')!r}",
        f"data.corpora.main.files has {tmp_path}/a.bak, whose suffix names no format",
        f"data.corpora.other.files has {str(tmp_path / 'b.jsonl')!r}",
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.jsonl.gz", "a.parquet", "a.arrow", "a.parquet.gz"])
def test_the_share_that_was_read_grows_to_one(tmp_path, monkeypatch, name):
    monkeypatch.setattr(json_rows, "BLOCK", 1 << 14)
    rows = [random.Random(i).randbytes(200).hex() for i in range(4000)]
    table = pa.table({"text": rows})
    content = {".parquet": parquet, ".arrow": arrow}.get(Path(name.removesuffix(".gz")).suffix, lambda table: None)(
        table
    )
    if content is None:
        content = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    content = {".gz": gzip.compress, ".zst": zstd}.get(Path(name).suffix, bytes)(content)
    half = write(tmp_path / "half.txt", bytes([65]) * len(content))
    corpus = RawCorpus("main", CorpusConfig(Source.files, [str(half), str(write(tmp_path / name, content))]))
    shares = [corpus.share for _ in corpus.documents(tmp_path)]
    assert shares[0] == 0.0 and shares == sorted(shares)
    assert shares[1] > 0.5 and shares[-1] == pytest.approx(1.0, abs=1e-3)
    if "arrow" not in name:  # of which a batch is read at a time
        assert shares[2000] == pytest.approx(0.75, abs=0.15)


# ------------------------------------------------------------ compression


def test_members_and_frames_one_after_another(tmp_path):
    half = LINES.index(b"\n", len(LINES) // 2) - 30  # within a line
    one, two = LINES[:half], LINES[half:]
    skippable = b"\x50\x2a\x4d\x18\x03\0\0\0abc"
    for name, content in {
        "a.jsonl.gz": gzip.compress(one) + gzip.compress(b"") + gzip.compress(two),
        "a.jsonl.bz2": bz2.compress(one) + bz2.compress(two),
        "a.jsonl.xz": lzma.compress(one) + lzma.compress(two),
        "a.jsonl.zst": zstd(one) + skippable + zstd(b"") + zstd(two) + skippable,
    }.items():
        assert texts(write(tmp_path / name, content)) == TEXTS, name


def test_empty_files_hold_no_documents(tmp_path):
    for name, content in {
        "a.jsonl": b"",
        "b.jsonl": b"\n\r\n \n",
        "c.jsonl": b"\xef\xbb\xbf",
        "d.json": b"[]",
        "e.jsonl.gz": gzip.compress(b""),
        "f.jsonl.gz": b"",
        "g.jsonl.zst": zstd(b""),
        "h.jsonl.zst": b"",
        "i.jsonl.xz": lzma.compress(b""),
        "j.txt": b"",
        "k.txt.gz": gzip.compress(b""),
        "l.txt.zst": b"",
        "m.parquet": b"",
        "n.parquet": parquet(pa.table({"text": pa.array([], pa.string())})),
        "o.arrow": arrow(pa.table({"text": pa.array([], pa.string())})),
    }.items():
        assert texts(write(tmp_path / name, content)) == [], name


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.jsonl.bz2", "a.jsonl.xz", "a.txt.gz", "a.parquet.gz"])
def test_what_is_cut_or_not_compressed_is_named(tmp_path, name):
    compress = {".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress, ".xz": lzma.compress}[Path(name).suffix]
    noise = random.Random(0).randbytes(200_000).hex()
    lines = "".join(json.dumps({"text": noise[i : i + 400]}) + "\n" for i in range(0, 400_000, 400)).encode()
    good = compress(parquet() if ".parquet" in name else lines)
    for content in (good[:-9], good[: len(good) // 2], b"not compressed at all"):
        with pytest.raises(DataError, match=rf"{name}: cannot be read") as caught:
            texts(write(tmp_path / name, content))
        assert "\n" not in str(caught.value)
    if name == "a.jsonl.gz":
        with pytest.raises(DataError, match=r"cannot be read as json: row [2-9]\d\d: Compressed file ended before"):
            texts(write(tmp_path / name, good[: len(good) // 2]))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet", "a.arrow", "a.jsonl.gz"])
def test_a_pointer_of_git_lfs_is_no_corpus(tmp_path, name):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
    with pytest.raises(DataError, match=rf"{name}: is a pointer of Git LFS.*git lfs pull"):
        texts(write(tmp_path / name, pointer))


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "BLOCK", 1 << 16)
    row = json.dumps({"text": "x" * 1000}).encode()
    for name, content in {
        "a.jsonl.zst": zstd(b"\n".join([row] * 12_000)),
        "a.json.gz": gzip.compress(b"[" + b",".join([row] * 12_000) + b"]", 1),
    }.items():
        path = write(tmp_path / name, content)
        documents = RawCorpus("main", CorpusConfig(Source.files, [str(path)])).documents(tmp_path)
        tracemalloc.start()
        assert sum(1 for _ in documents) == 12_000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 3e6  # of 12 MB


# ------------------------------------------------------------ Parquet and Arrow


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string()), pa.binary()]
)
def test_every_type_of_text(tmp_path, kind):
    values = pa.array(TEXTS).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(TEXTS, pa.string())
    table = pa.table({"nested": [{"text": "no"}] * len(TEXTS), "text": values.cast(kind), "text.a": TEXTS[::-1]})
    for name, content in {
        "a.parquet": parquet(table, row_group_size=7),
        "a.arrow": arrow(table),
        "b.arrow": arrow(table, pa.ipc.new_stream),
    }.items():
        path = write(tmp_path / name, content)
        assert texts(path) == TEXTS, name
        assert texts(path, text_key="text.a") == TEXTS[::-1]


def test_empty_row_groups_and_none(tmp_path):
    table = pa.table({"text": TEXTS})
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        for part in (table[:0], table[:9], table[:0], table[:0], table[9:], table[:0]):
            writer.write_table(part)
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups >= 5
    with pq.ParquetWriter(tmp_path / "b.parquet", table.schema):
        pass
    assert pq.ParquetFile(tmp_path / "b.parquet").num_row_groups == 0
    with pa.ipc.new_file(tmp_path / "c.arrow", table.schema) as writer:
        for part in (table[:0], table[:9], table[:0]):
            for batch in part.to_batches() or [pa.record_batch([pa.array([], pa.string())], names=["text"])]:
                writer.write_batch(batch)
    assert texts(tmp_path / "a.parquet", tmp_path / "b.parquet") == TEXTS
    assert texts(tmp_path / "c.arrow") == TEXTS[:9]


def test_files_of_one_corpus_may_have_other_columns(tmp_path):
    write(tmp_path / "a.parquet", parquet(pa.table({"text": TEXTS[:3], "n": [1, 2, 3]})))
    write(
        tmp_path / "b.parquet",
        parquet(pa.table({"n": ["x"], "url": ["u"], "text": pa.array(["b"]).cast("large_string")})),
    )
    assert texts(tmp_path / "*.parquet") == [*TEXTS[:3], "b"]
    write(tmp_path / "c.parquet", parquet(pa.table({"content": ["c"]})))
    with pytest.raises(
        DataError, match=r"c\.parquet: has no column 'text' \(data.corpora.main.text_key\); it has 'con"
    ):
        texts(tmp_path / "*.parquet")


def test_what_tables_hold_in_place_of_text(tmp_path):
    for values, message in (
        (["a", None], "row 2: column 'text' is None"),
        ([datetime.date(2024, 1, 1)], r"row 1: column 'text' is datetime.*"),
        ([{"a": 1}], r"row 1: column 'text' is \{'a': 1\}"),
        ([b"a", b"\xff"], r"row 2: column 'text' is b'.xff'"),
        ([1.5], r"row 1: column 'text' is 1\.5"),
        ([None], "row 1: column 'text' is None"),
    ):
        for name, content in {"a.parquet": parquet, "a.arrow": arrow}.items():
            path = write(tmp_path / name, content(pa.table({"text": values})))
            with pytest.raises(DataError, match=rf"{name}, {message}; a text is needed"):
                texts(path)
    many = parquet(pa.table({"text": ["a"] * 999 + [None]}), row_group_size=100)
    with pytest.raises(DataError, match=r"row 1000: column 'text' is None"):
        texts(write(tmp_path / "a.parquet", many))
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    with pytest.raises(DataError, match=r"has more than one column 'text'"):
        texts(write(tmp_path / "a.arrow", arrow(twice)))


def test_damaged_tables_are_named(tmp_path):
    noise = pa.table({"text": [random.Random(i).randbytes(300).hex() for i in range(2000)]})
    for name, content in (("a.parquet", parquet(noise, row_group_size=500)), ("a.arrow", arrow(noise))):
        for bad in (content[: len(content) // 2], content[:-1], b"PAR1" + content[4:] if "parquet" in name else b"x"):
            if bad.startswith(b"PAR1") and bad == content:
                bad = content[:200] + bytes(5000) + content[5200:]
            with pytest.raises(DataError, match=rf"{name}: cannot be read as ") as caught:
                texts(write(tmp_path / name, bad))
            assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="Feather of version 1"):
        texts(write(tmp_path / "a.feather", b"FEA1" + bytes(100) + b"FEA1"))
