"""Digests of packed corpora and tokenizers, and the folders they are kept under, are what they have always been.

A cache names its corpus and its tokenizer by these digests, and a run finds what was packed by the folder's name.
"""

import json
import os

import numpy as np

from distill.config.schema import CorpusConfig, DataConfig, ImageConfig, NeedleConfig, Source, TokenizerConfig
from distill.data.prepare import prepare
from tests.image_corpus import parquet, rows

TOKENIZER = "4267b92d740b87907b11c4686bef64ff"
SPLITS = {
    "masked train": "cf73519668dfd78e11eb842c05ebaf54",
    "plain train": "2fc1b2bdedfd357e535270f769dd4232",
    "images train": "d6c26d4e8af38bba8fea4e255dfed3fb",
    "digits train": "1b84cd74dd0b063307a01a3e88c98710",
    "needle train": "a57ff23bba3cbce101b78dc1f4f864f2",
    "masked held_out": "0c2a8930c35376dbb06de23140256edc",
    "digits held_out": "3d2de6c33c01e4c6e67abab937fc1498",
    "needle held_out": "80378bd8943e81b5be3ac25ec8deddb3",
}
FOLDERS = ["digits-73a958aabbb64cfe", "needle-89919024d069e611"]


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
