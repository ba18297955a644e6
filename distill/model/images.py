"""The images of a batch: tiles, and which tile's token fills which position."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distill.config.errors import DataError


class Images(NamedTuple):
    """Tiles of all images of a batch, and the positions of the tokens that they become."""

    tiles_NCHW: Tensor
    """[N, 3, tile_size, tile_size], RGB: uint8, which the model scales to [-1, 1], or floating-point numbers that are
    scaled already (`pixel_values` of transformers)."""
    patch_BS: Tensor
    """int64: which of the N * P image tokens (tile after tile, row-major within one) fills the position; -1: a text id
    does. A token may fill none, as where a sample ends within an image."""

    @staticmethod
    def in_order(tiles_NCHW: Tensor, ids_BS: Tensor, image_token_id: int, tile_tokens: int) -> Images:
        """All image tokens in order, into the positions whose id is `image_token_id`, row by row.

        Raises:
            DataError: the positions are not as many as the tiles' tokens.
        """
        here_BS = ids_BS == image_token_id
        places, tokens = int(here_BS.sum()), len(tiles_NCHW) * tile_tokens
        if places != tokens:
            raise DataError(
                f"{places} positions hold the image token {image_token_id}; {len(tiles_NCHW)} tiles of {tile_tokens} "
                f"tokens need {tokens}"
            )
        patch_BS = torch.full_like(ids_BS, -1)
        patch_BS[here_BS] = torch.arange(tokens, device=ids_BS.device)
        return Images(tiles_NCHW, patch_BS)
