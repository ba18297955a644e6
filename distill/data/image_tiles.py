"""Bytes of an image file -> RGB tiles -> token ids; the only file that uses pillow.

Images become tiles as for the released Llama 4 models: transparency over white, the camera's orientation applied, the
first frame of an animation; then the canvas of tiles that keeps most of the image, and where that has several tiles one
more with the whole image squashed into it.
"""

import io
import math
import warnings
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from distill.config.errors import DataError
from distill.config.schema import ImageConfig
from distill.data.tokenizer import ImageIds

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""The formats that are decoded; pillow has more, but some of its readers start other programs."""

MAX_PIXELS = 1 << 26
"""A file that unpacks to more is refused before it does."""


def decode(data: bytes, where: str) -> NDArray[np.uint8]:
    """The image of a file's bytes as RGB, uint8 [height, width, 3].

    Args:
        where: its name in messages.

    Raises:
        DataError: damaged, cut short, of another format, too large, or without 8 or 16 bits a channel.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with a file is an error here
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise DataError(f"{where}: {image.width} x {image.height} pixels; allowed: {MAX_PIXELS} in all")
                return np.asarray(_rgb(ImageOps.exif_transpose(image), where))
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{where}: not an image; allowed: {', '.join(FORMATS)}") from error
    except Exception as error:  # readers raise SyntaxError, struct.error, zlib.error and more
        raise DataError(f"{where}: cannot be decoded: {error or type(error).__name__}") from error


def _rgb(image: Image.Image, where: str) -> Image.Image:
    if image.mode == "F":
        raise DataError(f"{where}: its pixels are floating-point numbers; 8 or 16 bits a channel are needed")
    if image.mode.startswith("I"):  # 16 bits of gray, which pillow's own conversion would clip at 255
        gray = np.asarray(image).astype(np.int64).clip(0, 0xFFFF) >> 8
        return Image.fromarray(gray.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


class ImageTiles(NamedTuple):
    """An image cut into tiles, and the rows and columns that they form."""

    tiles_NCHW: NDArray[np.uint8]
    """[N, 3, tile_size, tile_size], row by row; the whole image as one tile comes last if there are several."""
    rows: int
    columns: int


def canvas(height: int, width: int, config: ImageConfig) -> tuple[int, int]:
    """Rows and columns of tiles for an image of this size.

    Of all canvases that hold the image unshrunk, those that leave it the smallest; with `resize_to_max_canvas`, and
    where none holds it, those that leave it the largest. Among equals the one of fewest tiles.
    """
    sheets = [(r, c) for r in range(1, config.max_tiles + 1) for c in range(1, config.max_tiles // r + 1)]
    scales = [min(r * config.tile_size / height, c * config.tile_size / width) for r, c in sheets]
    holding = [] if config.resize_to_max_canvas else [scale for scale in scales if scale >= 1]
    best = min(holding) if holding else max(scales)
    return min((sheet for sheet, scale in zip(sheets, scales) if scale == best), key=math.prod)


def cut(image_HWC: NDArray[np.uint8], config: ImageConfig) -> ImageTiles:
    """The tiles of an image [height, width, 3]; the part of the canvas that it leaves, right and below, is 0."""
    side = config.tile_size
    height, width = image_HWC.shape[:2]
    rows, columns = canvas(height, width, config)
    image = Image.fromarray(image_HWC)
    new_height, new_width = _fit(height, width, rows * side, columns * side, config)
    sheet = np.zeros((rows * side, columns * side, 3), np.uint8)
    sheet[:new_height, :new_width] = np.asarray(image.resize((new_width, new_height), Image.Resampling.BILINEAR))
    tiles = sheet.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, side, side)
    if len(tiles) > 1:
        whole = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))
        tiles = np.concatenate([tiles, whole.transpose(2, 0, 1)[None]])
    return ImageTiles(np.ascontiguousarray(tiles), rows, columns)


def _fit(height: int, width: int, canvas_height: int, canvas_width: int, config: ImageConfig) -> tuple[int, int]:
    """Height and width of the image on its canvas, its shape kept: a small one grows to a tile's side, no further."""
    high, wide = canvas_height, canvas_width
    if not config.resize_to_max_canvas:
        high, wide = min(max(height, config.tile_size), high), min(max(width, config.tile_size), wide)
    if wide * height < high * width:
        return max(1, height * wide // width), wide
    return high, max(1, width * high // height)


def layout(rows: int, columns: int, tile_tokens: int, ids: ImageIds) -> NDArray[np.int32]:
    """Token ids of an image of rows x columns tiles: 144 (rc + 1) + rc + 3 of them at 144 a tile, 147 for one tile."""
    tile = [ids.patch] * tile_tokens
    row = [*tile, *[ids.tile_x, *tile] * (columns - 1), ids.tile_y]
    parts = row * rows if rows * columns > 1 else []
    return np.array([ids.start, *parts, ids.image, *tile, ids.end], np.int32)
