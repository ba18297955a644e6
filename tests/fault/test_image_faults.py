"""Images that are damaged, swapped, missing or not what their row says: found, named, and nothing half-done left."""

import json
import sys

import numpy as np
import pytest
import torch

from distill.cache import CacheHeader, CacheReader, CacheWriter, make_codec
from distill.config.errors import CacheError, DataError
from distill.config.schema import CodecConfig, CorpusConfig, OnMissing, Source
from distill.data import digits, packed
from distill.data.join import Joiner, check_cache
from tests.image_corpus import MARKER, SIDE, parquet, pgm, prepared, rows

# ------------------------------------------------------------ swapped images


def test_an_image_altered_on_disk_is_found_when_it_is_read(tmp_path):
    data = prepared(tmp_path / "data", parquet(tmp_path / "a.parquet", rows()), 16)
    [path] = (tmp_path / "data").glob("main-*/train.tiles.arrow")
    good = path.read_bytes()
    at = good.index(bytes([77]) * SIDE * SIDE)  # a flat tile of that shade
    path.write_bytes(good[:at] + b"\x4e" + good[at + 1 :])
    corpus = packed.PackedCorpus(path.parent, "train", "main")
    whole = data.train["main"]
    with pytest.raises(DataError, match=r"train\.arrow: sample \d+ is damaged; remove its folder"):
        corpus.take(np.arange(len(whole)))


def test_every_flipped_bit_of_the_tiles_is_found_or_harmless(tmp_path):
    data = prepared(tmp_path / "data", parquet(tmp_path / "a.parquet", rows()), 16)
    corpus = data.train["main"]
    whole = corpus.take(np.arange(len(corpus)))
    rng, found = np.random.default_rng(0), 0
    for name in ("train.tiles.arrow", "train.arrow"):
        [path] = (tmp_path / "data").glob(f"main-*/{name}")
        good = path.read_bytes()
        for at in rng.integers(0, len(good), 100):
            bad = bytearray(good)
            bad[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(bad)
            try:
                got = packed.PackedCorpus(path.parent, "train", "main").take(np.arange(len(corpus)))
                for now, before in zip((*got[:4], *got.images), (*whole[:4], *whole.images)):
                    assert np.array_equal(now, before)
            except DataError as error:
                assert "train.arrow" in str(error)
                found += 1
        path.write_bytes(good)
    assert found > 100


def test_missing_tiles_are_named(tmp_path):
    corpus = parquet(tmp_path / "a.parquet", rows())
    prepared(tmp_path / "data", corpus, 16)
    [path] = (tmp_path / "data").glob("main-*/train.tiles.arrow")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"train\.arrow: not a packed corpus"):
        prepared(tmp_path / "data", corpus, 16)


def test_a_swapped_image_is_caught_at_the_join_with_the_teacher_s_targets(tmp_path):
    documents = rows()
    swapped = [(text, list(images)) for text, images in documents]
    swapped[1], swapped[6] = (swapped[1][0], documents[6][1]), (swapped[6][0], documents[1][1])
    ours = prepared(tmp_path / "1", parquet(tmp_path / "1.parquet", documents), 16)
    theirs = prepared(tmp_path / "2", parquet(tmp_path / "2.parquet", swapped), 16)
    a, b = ours.train["main"], theirs.train["main"]
    everything = np.arange(len(a))
    assert np.array_equal(a.take(everything).ids, b.take(everything).ids)  # the texts alone do not tell
    differ = np.flatnonzero(a.take(everything).digests != b.take(everything).digests)
    assert 2 <= len(differ) < len(a) / 2 and a.digest != b.digest

    codec = CodecConfig()
    header = CacheHeader(290, ours.tokenizer.digest, a.digest, 16, len(a), codec, seed=0)
    batch = Joiner([a], None, OnMissing.hard).batch(np.zeros(len(a), np.int64), everything)
    with CacheWriter(tmp_path / "cache", header, writer="t", counts_V=a.counts_V(290)) as writer:
        logits_TV = torch.zeros(len(a) * 16, 290)
        atoms, _ = make_codec(codec, 290).select(
            logits_TV, logits_TV.logsumexp(-1), seed=0,
            sample_ids_T=torch.as_tensor(everything).repeat_interleave(16),
            positions_T=torch.arange(16).repeat(len(a)),
        )  # fmt: skip
        zeros_T = torch.zeros(len(a) * 16)
        valid_T = batch.valid_BS.flatten()
        writer.put(everything, batch.digests_B, atoms, zeros_T, zeros_T, valid_T, step=0, tokens_seen=1, teacher="t")
        writer.finish()
    reader = CacheReader(tmp_path / "cache")
    check_cache(reader, ours.tokenizer, a, 290)
    assert Joiner([a], [reader], OnMissing.fail).batch(np.zeros(len(a), np.int64), everything).step_B.ge(0).all()
    with pytest.raises(CacheError, match=rf"corpus is '{a.digest}' in the cache, '{b.digest}' in this run"):
        check_cache(reader, theirs.tokenizer, b, 290)
    joiner = Joiner([b], [reader], OnMissing.hard)
    for i in everything:
        if i not in differ:
            joiner.batch(np.zeros(1, np.int64), np.array([i]))
            continue
        with pytest.raises(CacheError, match=rf"sample {i} has digest [0-9a-f]{{16}} in the cache"):
            joiner.batch(np.zeros(1, np.int64), np.array([i]))


# ------------------------------------------------------------ faults


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("none", [pgm(4, 1)], r"row 2: column 'text' has <\|image\|> 0 times, its row has 1 images"),
        (f"{MARKER}{MARKER}", [pgm(4, 1)], r"row 2: column 'text' has <\|image\|> 2 times, its row has 1 images"),
        (MARKER, [], r"row 2: column 'text' has <\|image\|> 1 times, its row has 0 images"),
        (MARKER, None, r"row 2: column 'text' has <\|image\|> 1 times, its row has 0 images"),
        (f"{MARKER}<|patch|>", [pgm(4, 1)], r"row 2: column 'text' has <\|patch\|>; beside"),
        (MARKER, [b"GIF89a"], r"a\.parquet, row 2: column 'images', image 1: cannot be decoded|not an image"),
        (f"{MARKER} {MARKER}", [pgm(4, 1), b"?"], r"a\.parquet, row 2: column 'images', image 2: not an image"),
    ],
)
def test_rows_that_do_not_fit_are_named(tmp_path, text, images, message):
    documents = [rows()[1], (text, images), *rows()]
    with pytest.raises(DataError, match=message):
        prepared(tmp_path / "data", parquet(tmp_path / "a.parquet", documents), 16)
    assert not list((tmp_path / "data").glob("main-*"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("gone.png", r"row 1: column 'images' has 'gone\.png'; .*gone\.png is no file"),
        (".", r"row 1: column 'images' has '\.'; .* is no file"),
        ("a\0b", r"is no file"),
        (7, r"row 1: column 'images' has 7; a path, bytes, a dict of both, or a list of these is needed"),
        ({"url": "x"}, r"row 1: column 'images' has None; a path, bytes"),
        (["gone.png"], r"row 1: column 'images' has 'gone\.png'"),
    ],
)
def test_what_names_no_image_is_refused(tmp_path, value, message):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": MARKER, "images": value}) + "\n")
    corpus = CorpusConfig(Source.files, [str(path)], held_out=0.0, image_key="images")
    with pytest.raises(DataError, match=message):
        prepared(tmp_path / "data", corpus, 16)


def test_text_files_have_no_column_of_images(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    corpus = CorpusConfig(Source.files, [str(tmp_path / "a.txt")], held_out=0.0, image_key="images")
    with pytest.raises(DataError, match=r"main\.image_key is 'images'; .*a\.txt is text and has no columns"):
        prepared(tmp_path / "data", corpus, 16)


def test_digits_without_their_library_are_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="source is digits; scikit-learn, which holds them, is not installed"):
        next(digits.read())
