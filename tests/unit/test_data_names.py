"""Data files with any name: an existing file of that very name wins over a pattern, and none is taken for a URL."""

import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill.config.schema import CorpusConfig, Source
from distill.data.formats import kind_of
from distill.data.raw_corpus import RawCorpus
from distill.data.tables import rows

NAMES = [
    "a::b",
    "zip::a",
    "a:b",
    "a b",
    "ä",
    "a#b",
    "a?b",
    "a%20b",
    "a*b",
    "[a]",
    "a[0]",
    "a'b",
    "a\\",
    "a\nb",
    "~",
    "{a}",
]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_rows_of_a_file_with_any_name(tmp_path, kind):
    for number, name in enumerate(NAMES):
        for path in (tmp_path / f"{name}.{kind}", tmp_path / f"in {name}" / f"file.{kind}"):
            path.parent.mkdir(exist_ok=True)
            line = b'{"text": "number %d"}\n' % number
            if kind == "parquet":
                with path.open("wb") as file:
                    pq.write_table(pa.table({"text": [f"number {number}"]}), file)
            else:
                path.write_bytes(gzip.compress(line) if kind == "jsonl.gz" else line)
            found = rows(path, kind_of(path), {"text": "key"}, tmp_path, lambda share: None)
            assert list(found) == [(1, {"text": f"number {number}"})], path


@pytest.mark.parametrize("name", NAMES)
def test_files_are_found_by_any_name(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    for other in ("ab", "a", "ax0"):  # what a pattern might find instead
        (tmp_path / other).mkdir(exist_ok=True)
        (tmp_path / other / "x.txt").write_text("other")
        (folder / f"{other}.txt").write_text("other")
    (folder / f"{name}.txt").write_text("mine")

    def texts(pattern):
        corpus = RawCorpus("main", CorpusConfig(Source.files, [pattern], held_out=0.0))
        return [document.text for document in corpus.documents(tmp_path)]

    assert texts(f"{folder}/{name}.txt") == ["mine"]
    assert texts(f"{folder}/[a]*.txt").count("other") == 3 and "mine" in texts(f"{folder}/*.txt")
