"""A small corpus of images among text whose tiles are known beforehand."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from distill.config.schema import CorpusConfig, DataConfig, ImageConfig, Source, TokenizerConfig
from distill.data.prepare import Prepared, prepare
from distill.model.images import Images

SIDE, P = 4, 3
CONFIG = ImageConfig(tile_size=SIDE, tile_tokens=P, max_tiles=2)
MARKER = "<|image|>"


def pgm(height: int, *halves: int) -> bytes:
    """An image of flat gray squares side by side, each of a tile's size: its tiles are these, and last their mix."""
    row = b"".join(bytes([value]) * SIDE for value in halves)
    return f"P5 {SIDE * len(halves)} {height} 255\n".encode() + row * height


def in_order(tiles_NCHW: Tensor, ids_BS: Tensor, image_token_id: int, tile_tokens: int) -> Images:
    """All tokens of tiles in order, at the positions whose id is `image_token_id`, row by row."""
    here_BS = ids_BS == image_token_id
    assert here_BS.sum() == len(tiles_NCHW) * tile_tokens
    patch_BS = torch.full_like(ids_BS, -1)
    patch_BS[here_BS] = torch.arange(int(here_BS.sum()))
    return Images(tiles_NCHW, patch_BS)


def rows() -> list[tuple[str, list[bytes]]]:
    """Texts and images: none, one, several, side by side, at either end, of one tile and of two."""
    shades = iter(range(1, 250))

    def one():
        return pgm(SIDE, next(shades))

    def two():
        return pgm(SIDE, next(shades), next(shades))

    found = []
    for i in range(12):
        found += [
            (f"no image, only the words of row {i}", []),
            (f"{MARKER}first", [one()]),
            (f"in the {MARKER} middle {i}", [two()]),
            (f"last {MARKER}", [one()]),
            (f"{MARKER}{MARKER} and {MARKER}", [two(), one(), two()]),
        ]
    return found


def parquet(path: Path, documents, ranges=None) -> CorpusConfig:
    columns = {"text": [text for text, _ in documents], "images": [images for _, images in documents]}
    if ranges is not None:
        columns["m"] = ranges
    pq.write_table(pa.table(columns), path)
    mask_key = None if ranges is None else "m"
    return CorpusConfig(Source.files, [str(path)], held_out=0.0, image_key="images", mask_key=mask_key)


def prepared(folder: Path, corpora, sample_tokens: int, **tokenizer) -> Prepared:
    corpora = corpora if isinstance(corpora, dict) else {"main": corpora}
    tokens = TokenizerConfig(vocab_size=290, **tokenizer)
    return prepare(DataConfig(corpora, tokens, sample_tokens=sample_tokens, images=CONFIG), folder, 1000)
