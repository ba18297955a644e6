"""The images of a batch: tiles, and which tile's token fills which position."""

from typing import NamedTuple

from torch import Tensor


class Images(NamedTuple):
    """Tiles of all images of a batch, and the positions of the tokens that they become."""

    tiles_NCHW: Tensor
    """[N, 3, tile_size, tile_size], RGB: uint8, which the model scales to [-1, 1], or floating-point numbers that are
    scaled already (`pixel_values` of transformers)."""
    patch_BS: Tensor
    """int64: which of the N * P image tokens (tile after tile, row-major within one) fills the position; -1: a text id
    does. A token may fill none, as where a sample ends within an image."""
