"""Digests of packed corpora and tokenizers, and the folders they are kept under, are what they have always been.

A cache names its corpus and its tokenizer by these digests, and a run finds what was packed by the folder's name.
"""

import json
import os

import numpy as np

from distill.config.schema import CorpusConfig, DataConfig, ImageConfig, NeedleConfig, Source, TokenizerConfig
from distill.data.prepare import prepare
from tests.pictures import parquet, rows

TOKENIZER = "771d7fa0c7ab069d18552cdad1729c81"
SPLITS = {
    "masked train": "044f98d206401c2bd5a1eb9e840cedc4",
    "plain train": "494e5a54645fc771bea86b44460dd610",
    "images train": "a1a300a9d5fff0cbfc839b1b86cbb234",
    "digits train": "95855ff69abf48453d7f21b74d2585ed",
    "needle train": "888ca73e7473584327ac0fbbd1b270df",
    "masked held_out": "dc2faccbfed58b3cd1eed404c186b27e",
    "digits held_out": "1b13ca9faf2602a65fd92f09c4718e78",
    "needle held_out": "4f7cebc6bcbed09c51f64e1c2bf50c78",
}
FOLDERS = ["digits-3ffd3d8e8b278cee", "needle-abb5cf71552164bd"]


def text(seed: int, documents: int) -> list[str]:
    rng = np.random.default_rng(seed)
    words = ["the", "a", "cat", "sat", "over", "naïve", "漢字", "(x)", "=", "5;", "\n", "return"]
    return [" ".join(rng.choice(words, rng.integers(0, 60))) for _ in range(documents)]


def test_a_mixture_of_every_kind_of_corpus(tmp_path):
    lines = [json.dumps({"text": t, "m": [[0, len(t) // 2]]}) for t in text(0, 80)]
    (tmp_path / "masked.jsonl").write_text("\n".join(lines))
    for number, content in enumerate(text(1, 30)):
        (tmp_path / f"{number:02}.txt").write_text(content)
    corpora = {
        "masked": CorpusConfig(Source.files, [str(tmp_path / "masked.jsonl")], held_out=0.2, mask_key="m"),
        "plain": CorpusConfig(Source.files, [f"{tmp_path}/*.txt"], held_out=0.0, whole_documents=True),
        "images": parquet(tmp_path / "images.parquet", rows()),
        "digits": CorpusConfig(Source.digits, held_out=0.3, max_documents=40, whole_documents=True),
        "needle": CorpusConfig(Source.needle, held_out=0.1, max_documents=60, needle=NeedleConfig(longest=100)),
    }
    images = ImageConfig(tile_size=16, tile_tokens=4, max_tiles=2)
    config = DataConfig(corpora, TokenizerConfig(vocab_size=400), sample_tokens=64, images=images)
    prepared = prepare(config, tmp_path / "data", 1000)
    assert prepared.tokenizer.digest == TOKENIZER
    splits = {"train": prepared.train, "held_out": prepared.held_out}
    digests = {f"{name} {split}": corpus.digest for split, part in splits.items() for name, corpus in part.items()}
    assert digests == SPLITS
    # The names of the others depend on the paths and times of their files.
    assert sorted(name for name in os.listdir(tmp_path / "data") if name.startswith(("digits", "needle"))) == FOLDERS
