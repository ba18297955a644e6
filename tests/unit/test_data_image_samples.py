"""Images among text, from table rows to batches, against a packer in plain Python."""

import dataclasses
import json
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import xxhash

from distill.config.errors import DataError
from distill.config.schema import (
    IMAGE_TOKENS,
    CorpusConfig,
    DataConfig,
    ImageConfig,
    OnMissing,
    Source,
    TokenizerConfig,
)
from distill.data import digits, packed
from distill.data import tile_store as tiles
from distill.data.join import Joiner
from distill.data.prepare import prepare
from distill.data.tokenizer import train_tokenizer
from distill.model.images import Images
from tests.image_corpus import MARKER, SIDE, P, in_order, parquet, pgm, prepared, rows


def expected_tiles(image: bytes) -> list[int]:
    """The shade of each tile of an image made by `pgm`; -1 for the last of several, which mixes them."""
    width = int(image.split()[1])
    shades = list(image[-width:][::SIDE])
    return shades if len(shades) == 1 else [*shades, -1]


def expected(documents, tokenizer, loss_of=lambda place, text: True):
    """The stream as (id, document, label?, tile, place in the tile), and the shade of every tile."""
    start, end, tile_x, tile_y, image, patch = (tokenizer.encode_batch([t])[0][0][0] for t in IMAGE_TOKENS)
    stream, shades = [], []
    for number, (text, images) in enumerate(documents):
        images = iter(images)
        stream.append((tokenizer.bos_id, number, False, -1, -1))
        for token, (first, _) in zip(*tokenizer.encode_batch([text])[0]):
            if token != image:
                stream.append((token, number, loss_of(first, text), -1, -1))
                continue
            own = expected_tiles(next(images))
            tiles_of = [[(patch, number, False, len(shades) + t, place) for place in range(P)] for t in range(len(own))]
            name = {token: [(token, number, False, -1, -1)] for token in (start, end, tile_x, tile_y, image)}
            stream += name[start]
            if len(own) > 1:
                stream += tiles_of[0] + name[tile_x] + tiles_of[1] + name[tile_y]
            stream += name[image] + tiles_of[-1] + name[end]
            shades += own
        stream.append((tokenizer.eos_id, number, loss_of(len(text) - 1, text), -1, -1))
    return stream, shades


def check(corpus, stream, shades, sample_tokens, patch_id):
    """Every sample of `corpus` is that part of the stream, with the tiles that its inputs touch and no others."""
    got = corpus.take(np.arange(len(corpus)))
    assert len(corpus) == (len(stream) - 1) // sample_tokens > 0
    assert len(got.images.tiles_NCHW) == got.images.counts_B.sum()
    firsts = got.images.counts_B.cumsum() - got.images.counts_B
    for i in range(len(corpus)):
        part = stream[i * sample_tokens : (i + 1) * sample_tokens + 1]
        ids, documents, mask, numbers, places = (np.array(column) for column in zip(*part))
        assert got.ids[i].tolist() == ids.tolist()
        assert got.documents[i].tolist() == (documents - documents[0]).tolist()
        assert got.mask[i].tolist() == mask.tolist()
        own = got.images.tiles_NCHW[firsts[i] : firsts[i] + got.images.counts_B[i]]
        touched = sorted(set(numbers[:-1].tolist()) - {-1})
        assert len(own) == len(touched)
        for tile, number in zip(own, touched):
            assert shades[number] == -1 or (tile == shades[number]).all()
        patch = got.images.patch_BS[i]
        assert ((patch >= 0) == (numbers[:-1] >= 0)).all() and ((patch >= 0) == (ids[:-1] == patch_id)).all()
        for where in np.flatnonzero(patch >= 0):
            tile, place = divmod(int(patch[where]), P)
            assert touched[tile] == numbers[where] and place == places[where]
        record = struct.pack(f"<{len(part)}i", *ids) + struct.pack(f"<{len(part)}i", *(documents - documents[0]))
        digest = xxhash.xxh3_64_intdigest(record + bytes(mask.tolist()))
        if touched:
            marks = b"".join(xxhash.xxh3_128_digest(tile.tobytes()) for tile in own)
            offset = next(p for n, p in zip(numbers, places) if n >= 0)
            digest = xxhash.xxh3_64_intdigest(struct.pack("<QI", digest, offset) + marks)
        assert int(got.digests[i]) == digest


# ------------------------------------------------------------ packing


@pytest.mark.parametrize("sample_tokens", [*range(1, 20), 64, 200])
def test_samples_cut_images_anywhere(tmp_path, monkeypatch, sample_tokens):
    monkeypatch.setattr(packed, "BATCH_TOKENS", 40)
    monkeypatch.setattr(tiles, "BATCH_BYTES", 5 * 3 * SIDE * SIDE)
    documents = rows()
    data = prepared(tmp_path, parquet(tmp_path / "a.parquet", documents), sample_tokens)
    stream, shades = expected(documents, data.tokenizer)
    check(data.train["main"], stream, shades, sample_tokens, data.tokenizer.image_ids().patch)


def test_no_token_of_an_image_is_ever_a_label_and_what_follows_one_is(tmp_path):
    data = prepared(tmp_path, parquet(tmp_path / "a.parquet", rows()), 16)
    got, ids = data.train["main"].take(np.arange(len(data.train["main"]))), data.tokenizer.image_ids()
    assert not got.mask[np.isin(got.ids, ids)].any()
    behind = got.mask[:, 1:][got.ids[:, :-1] == ids.end]
    starts = (got.ids[:, 1:] == ids.start)[got.ids[:, :-1] == ids.end]
    assert (behind == ~starts).all() and behind.any() and starts.any()


def test_character_ranges_count_the_marker(tmp_path):
    documents = rows()
    half = [[[len(text) // 2, len(text)]] for text, _ in documents]
    data = prepared(tmp_path, parquet(tmp_path / "a.parquet", documents, half), 16)

    def loss_of(first: int, text: str) -> bool:
        # A token carries loss if it reaches into the second half.
        [(_, offsets)] = data.tokenizer.encode_batch([text])
        end = next((end for start, end in offsets if start <= first < end), len(text))
        return end > len(text) // 2

    stream, shades = expected(documents, data.tokenizer, loss_of)
    check(data.train["main"], stream, shades, 16, data.tokenizer.image_ids().patch)


@pytest.mark.parametrize("sample_tokens", [1, 8, 21, 30, 64])
def test_whole_documents_begin_a_new_sample_rather_than_be_cut(tmp_path, sample_tokens):
    documents = rows()
    corpus = dataclasses.replace(parquet(tmp_path / "a.parquet", documents), whole_documents=True)
    data = prepared(tmp_path, corpus, sample_tokens)
    plain, shades = expected(documents, data.tokenizer)
    stream = []
    for number in range(len(documents)):
        document = [token for token in plain if token[1] == number]
        place = len(stream) % sample_tokens
        if place and place + len(document) > sample_tokens + 1 and len(document) <= sample_tokens + 1:
            stream += [(data.tokenizer.eos_id, number - 0.5, False, -1, -1)] * (sample_tokens - place)
        stream += document
    order = {ordinal: rank for rank, ordinal in enumerate(sorted({token[1] for token in stream}))}
    stream = [(token[0], order[token[1]], *token[2:]) for token in stream]
    check(data.train["main"], stream, shades, sample_tokens, data.tokenizer.image_ids().patch)
    assert (len(stream) > len(plain)) == (sample_tokens > 20)


def test_a_corpus_without_images_packs_as_if_there_were_none(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"only words in row {i}"}) + "\n" for i in range(50)))
    text = CorpusConfig(Source.files, [str(path)], held_out=0.0)
    alone = prepared(tmp_path / "1", text, 16).train["main"]
    beside = prepared(tmp_path / "2", {"main": text, "seen": parquet(tmp_path / "b.parquet", rows())}, 16)
    for data in (alone, beside.train["main"]):
        assert data.take(np.arange(3)).images is None
        assert [p.name for p in data._path.parent.glob("train*")].count("train.tiles.arrow") == 0
        assert "tiles" not in json.loads((data._path.parent / "train.json").read_text())


def test_a_table_of_images_may_have_rows_without_any(tmp_path):
    documents = [(f"row {i} of text", []) for i in range(40)]
    got = prepared(tmp_path, parquet(tmp_path / "a.parquet", documents), 16).train["main"].take(np.arange(3))
    assert len(got.images.tiles_NCHW) == 0 and (got.images.patch_BS == -1).all()


# ------------------------------------------------------------ how a table may hold them


def test_every_form_of_an_image_gives_the_same_corpus(tmp_path):
    documents = [(text, images) for text, images in rows() if len(images) == 1]
    texts, files = [text for text, _ in documents], [images[0] for _, images in documents]
    (tmp_path / "some").mkdir()
    names = [f"some/{i}.pgm" for i in range(len(files))]
    for name, data in zip(names, files):
        (tmp_path / name).write_bytes(data)
    both = [{"bytes": data if i % 2 else None, "path": name} for i, (name, data) in enumerate(zip(names, files))]
    tables = {
        "bytes": {"text": texts, "images": files},
        "lists": {"text": texts, "images": [[data] for data in files]},
        "paths": {"text": texts, "images": names},
        "dicts": {"text": texts, "images": both},
    }
    for name, table in tables.items():
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    # As the library writes them: it puts the bytes in, and says in the file that they are images.
    whole = [{"bytes": None, "path": str(tmp_path / name)} for name in names]
    features({"text": texts, "images": whole}).to_parquet(tmp_path / "features.parquet")
    features({"text": texts, "images": [[p] for p in whole]}, many=True).to_parquet(tmp_path / "many.parquet")
    lines = [json.dumps({"text": text, "images": name}) for text, name in zip(texts, names)]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    found = set()
    for name in (*(f"{n}.parquet" for n in (*tables, "features", "many")), "lines.jsonl"):
        corpus = CorpusConfig(Source.files, [str(tmp_path / name)], held_out=0.3, image_key="images")
        data = prepared(tmp_path / "data" / name, corpus, 16)
        found.add((data.train["main"].digest, data.held_out["main"].digest))
    assert len(found) == 1


def features(table, many: bool = False):
    import datasets

    image = datasets.Image()
    kinds = {"text": datasets.Value("string"), "images": datasets.Sequence(image) if many else image}
    return datasets.Dataset.from_dict(table, features=datasets.Features(kinds))


def test_rows_about_the_same_image_fall_on_the_same_side(tmp_path):
    shades = [bytes(pgm(SIDE, i)) for i in range(1, 101)]
    documents = [(f"{MARKER} question {turn}, and words enough", [data]) for turn in range(3) for data in shades]
    corpus = dataclasses.replace(parquet(tmp_path / "a.parquet", documents), held_out=0.3)
    data = prepared(tmp_path, corpus, 16)
    sides = []
    for split in (data.train, data.held_out):
        got = split["main"].take(np.arange(len(split["main"])))
        sides.append(set(got.images.tiles_NCHW[:, 0, 0, 0].tolist()))
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) >= 98 and 15 < len(sides[1]) < 45


# ------------------------------------------------------------ batches


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": f"only words in {i}"}) + "\n" for i in range(60)))
    text = CorpusConfig(Source.files, [str(folder / "a.jsonl")], held_out=0.0)
    corpora = {"text": text, "seen": parquet(folder / "b.parquet", rows())}
    corpora["other"] = parquet(folder / "c.parquet", rows()[::-1])
    return prepared(folder, corpora, 16)


def told(images: Images | None, batch_size: int, length: int = 16) -> list[list[bytes | None]]:
    """For every position, the bytes of its tile and the place in it; None: text."""
    if images is None:
        return [[None] * length] * batch_size
    tile, place = images.patch_BS // P, images.patch_BS % P
    return [
        [None if p < 0 else images.tiles_NCHW[t].numpy().tobytes() + bytes([o]) for p, t, o in zip(*row)]
        for row in zip(images.patch_BS.tolist(), tile.tolist(), place.tolist())
    ]


def test_batches_of_any_order_and_mixture_and_their_micro_batches(data):
    corpora = list(data.train.values())
    joiner = Joiner(corpora, None, OnMissing.hard)
    rng = np.random.default_rng(0)
    for _ in range(20):
        size = int(rng.integers(2, 9))
        corpus_B = rng.integers(0, 3, size)
        ids_B = np.array([rng.integers(len(corpora[c])) for c in corpus_B])
        batch = joiner.batch(corpus_B, ids_B)
        alone = [joiner.batch(corpus_B[b : b + 1], ids_B[b : b + 1]) for b in range(size)]
        want = [told(b.images, 1)[0] for b in alone]
        assert told(batch.images, size) == want
        assert all(b.images is None for b, c in zip(alone, corpus_B) if c == 0)
        start = int(rng.integers(size))
        stop = int(rng.integers(start + 1, size + 1))
        part = batch.rows(start, stop)
        assert told(part.images, stop - start) == want[start:stop]
        assert (part.images is None) == (not any(any(row) for row in want[start:stop]))
        assert told(part.rows(0, 1).images, 1) == want[start : start + 1]
        if batch.images is not None:
            assert batch.images.tiles_NCHW.dtype == torch.uint8 and batch.images.patch_BS.dtype == torch.int64
            assert batch.to(torch.device("meta")).images.patch_BS.device.type == "meta"
    assert joiner.batch(np.zeros(3, np.int64), np.arange(3)).images is None


def test_images_are_those_that_whole_images_in_order_give(data):
    """The batch's own positions against the rule for whole images: all image tokens in order."""
    corpora, patch = list(data.train.values()), data.tokenizer.image_ids().patch
    joiner, whole = Joiner(corpora, None, OnMissing.hard), 0
    for i in range(len(corpora[1])):
        batch = joiner.batch(np.array([1]), np.array([i]))
        if batch.images is not None and int((batch.ids_BS == patch).sum()) == len(batch.images.tiles_NCHW) * P:
            want = in_order(batch.images.tiles_NCHW, batch.ids_BS, patch, P)
            assert torch.equal(batch.images.patch_BS, want.patch_BS)
            whole += 1
    assert whole > 3


# ------------------------------------------------------------ the tokenizer


def test_ids_of_a_trained_tokenizer_are_known(tmp_path):
    corpus = parquet(tmp_path / "a.parquet", rows())
    assert tuple(prepared(tmp_path, corpus, 16).tokenizer.image_ids()) == (2, 3, 4, 5, 6, 7)
    assert tuple(prepared(tmp_path, corpus, 16, bos=None).tokenizer.image_ids()) == (1, 2, 3, 4, 5, 6)


def test_a_given_tokenizer_needs_the_tokens_of_images(tmp_path):
    corpus = parquet(tmp_path / "a.parquet", rows())
    train_tokenizer(TokenizerConfig(vocab_size=290), ["words"] * 5).save(tmp_path / "text.json")
    with pytest.raises(DataError, match=r"text\.json: has no <\|image_start\|>, .*<\|patch\|>; a corpus with images"):
        prepared(tmp_path, corpus, 16, file=str(tmp_path / "text.json"))
    own = train_tokenizer(TokenizerConfig(vocab_size=290), ["words"] * 5, images=True)
    own.save(tmp_path / "own.json")
    assert prepared(tmp_path, corpus, 16, file=str(tmp_path / "own.json")).tokenizer.digest == own.digest


# ------------------------------------------------------------ the digits


def test_digits_are_the_same_every_time_and_captions_tell_the_truth():
    from sklearn.datasets import load_digits

    found = list(digits.read(100))
    assert found == list(digits.read(100)) and len(found) == 300 and len({d.image for d in found}) > 280
    phrasings = [caption.split("{}") for caption in (*digits.NAMES, *digits.HINTS.values())]
    met = set()
    for digit, label in zip(found, np.repeat(load_digits().target, 3).tolist()):
        [kind] = [i for i, (x, y) in enumerate(phrasings) if digit.text.startswith(x) and digit.text.endswith(y)]
        before, after = phrasings[kind]
        figure = digit.text.removeprefix(before).removesuffix(after)
        assert label == int(figure) if kind < 2 else label > int(figure) if kind == 2 else label < int(figure)
        assert (digit.answer is None) == (kind > 1)
        if digit.answer is not None:
            assert digit.text[slice(*digit.answer)] == figure
        assert digit.text.count(MARKER) == 1 and digit.text.index(MARKER) < len(before)
        assert not before[-1].isalnum() and not before[-1].isspace() and after
        met.add((kind, digit.image.split(b"\n")[0]))
    assert met == {(kind, size) for kind in range(4) for size in (b"P5 32 32 255", b"P5 64 32 255")}
    assert [d.original for d in found[::3]] == [d.original for d in found[2::3]]


def test_held_out_digits_are_other_images_and_ask_for_the_digit_alone(tmp_path):
    corpus = CorpusConfig(Source.digits, held_out=0.3, max_documents=200, whole_documents=True)
    config = ImageConfig(tile_size=32, tile_tokens=4, max_tiles=4)
    data = prepare(
        DataConfig({"d": corpus}, TokenizerConfig(vocab_size=300), sample_tokens=64, images=config), tmp_path, 300
    )
    trained, kept = (split["d"].take(np.arange(len(split["d"]))) for split in (data.train, data.held_out))
    asked = kept.ids[kept.mask]
    assert 70 < len(asked) < 140 and {data.tokenizer.decode([i]) for i in asked} == set("0123456789")
    # Once in every document, and where its image is seen whole.
    for i in range(len(kept.ids)):
        ends = np.flatnonzero(kept.ids[i] == data.tokenizer.image_ids().end)
        answers = np.flatnonzero(kept.mask[i])
        assert (kept.documents[i][ends[: len(answers)]] == kept.documents[i][answers]).all()
    assert (trained.mask.sum() + len(trained.ids)) / trained.ids.size > 0.3
    seen = [{t.tobytes() for t in part.images.tiles_NCHW if t.any()} for part in (trained, kept)]
    assert not seen[0] & seen[1]
