"""Images to tiles and tokens: layouts worked out by hand, formats, and files that are not what they should be."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from distill.config.errors import DataError
from distill.config.schema import IMAGE_TOKENS, ImageConfig
from distill.data import image_tiles as images
from distill.data.tokenizer import ImageIds

RELEASED = ImageConfig()
NAMES = dict(enumerate(["s", "e", "x", "y", "i", "p"], 1))  # short names of IMAGE_TOKENS
IDS = ImageIds(*NAMES)


def file(image, kind: str = "PNG", **options) -> bytes:
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image, np.uint8))
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ------------------------------------------------------------ canvases, by hand


@pytest.mark.parametrize(
    ("height", "width", "tiles", "size"),
    [
        (336, 336, (1, 1), (336, 336)),
        (100, 100, (1, 1), (336, 336)),  # the smallest canvas holds it; it grows to a tile's side
        (100, 200, (1, 1), (168, 336)),  # 1 x 1 holds it at 1.68, 1 x 2 only at 3.36
        (1, 1, (1, 1), (336, 336)),
        (337, 337, (2, 2), (337, 337)),  # one pixel too many for one tile; not enlarged beyond it
        (336, 672, (1, 2), (336, 672)),
        (672, 336, (2, 1), (672, 336)),
        (300, 673, (1, 3), (300, 673)),  # the height might grow to 336, but the width not beyond its own 673
        (1000, 500, (3, 2), (1000, 500)),  # 1008 / 1000 is the tightest fit
        (3000, 4000, (3, 4), (1008, 1344)),  # nothing holds it; 3 x 4, 3 x 5 and 4 x 4 all shrink it to 0.336
        (1, 10000, (1, 16), (1, 5376)),  # 5376 / 10000; half a pixel high is one
        (10000, 1, (16, 1), (5376, 1)),
        (20000, 20000, (4, 4), (1344, 1344)),
    ],
)
def test_released_preprocessing(height, width, tiles, size):
    assert images.canvas(height, width, RELEASED) == tiles
    assert images._fit(height, width, tiles[0] * 336, tiles[1] * 336, RELEASED) == size


@pytest.mark.parametrize(
    ("height", "width", "max_tiles", "tiles", "size"),
    [
        (100, 100, 16, (4, 4), (1344, 1344)),
        (100, 200, 16, (3, 5), (840, 1680)),  # 8.4 times; 2 x 4 would be 6.72
        (100, 200, 2, (1, 2), (336, 672)),
        (500, 100, 3, (3, 1), (1008, 201)),  # 2.016 times, and floor(201.6)
        (2000, 1000, 4, (2, 1), (672, 336)),  # shrunk to 0.336 by 2 x 1 and by 2 x 2
    ],
)
def test_enlarged_to_the_largest_canvas(height, width, max_tiles, tiles, size):
    config = ImageConfig(max_tiles=max_tiles, resize_to_max_canvas=True)
    assert images.canvas(height, width, config) == tiles
    assert images._fit(height, width, tiles[0] * 336, tiles[1] * 336, config) == size


@pytest.mark.parametrize("max_tiles", [1, 2, 3])
def test_few_tiles_leave_few_canvases(max_tiles):
    config = ImageConfig(max_tiles=max_tiles)
    assert images.canvas(5000, 100, config) == (max_tiles, 1)
    assert images.canvas(100, 5000, config) == (1, max_tiles)
    assert images.canvas(5000, 5000, config) == (1, 1)


# ------------------------------------------------------------ pixels


def test_tiles_are_row_by_row_and_the_whole_image_comes_last():
    config = ImageConfig(tile_size=8, max_tiles=6)
    image = noise(16, 24)
    tiles, rows, columns = images.cut(image, config)
    assert (rows, columns, tiles.shape, tiles.dtype) == (2, 3, (7, 3, 8, 8), np.uint8)
    for r in range(2):
        for c in range(3):
            block = image[8 * r : 8 * r + 8, 8 * c : 8 * c + 8]
            assert np.array_equal(tiles[3 * r + c].transpose(1, 2, 0), block)
    # Squashed 2 x 3 to 1: the mean is kept, and each pixel averages its surroundings.
    assert tiles[6].mean() == pytest.approx(image.mean(), abs=3)
    assert tiles[6].std() < 0.7 * image.std()


def test_one_tile_has_no_whole_image_beside_it():
    tiles, rows, columns = images.cut(noise(8, 8), ImageConfig(tile_size=8))
    assert (rows, columns) == (1, 1) and np.array_equal(tiles[0].transpose(1, 2, 0), noise(8, 8))


def test_what_is_left_of_the_canvas_is_black():
    # 2 x 1 tiles hold 9 x 6 pixels; the height may not grow beyond its own 9, so the width stays 6.
    image = np.full((9, 6, 3), 200, np.uint8)
    tiles, rows, columns = images.cut(image, ImageConfig(tile_size=8, max_tiles=4))
    assert (rows, columns) == (2, 1)
    sheet = tiles[:2].transpose(0, 2, 3, 1).reshape(16, 8, 3)
    assert (sheet[:9, :6] == 200).all() and not sheet[9:].any() and not sheet[:, 6:].any()
    assert (tiles[2] == 200).all()  # squashed, not padded


def test_a_flat_image_stays_flat_when_it_is_resized():
    for height, width in ((1, 1), (5, 90), (123, 45), (1, 300)):
        tiles, _, _ = images.cut(np.full((height, width, 3), 77, np.uint8), ImageConfig(tile_size=28, max_tiles=4))
        assert set(np.unique(tiles)) <= {0, 77}


# ------------------------------------------------------------ tokens


@pytest.mark.parametrize(
    ("rows", "columns", "text"),
    [
        (1, 1, "s i p p e"),
        (1, 2, "s p p x p p y i p p e"),
        (2, 1, "s p p y p p y i p p e"),
        (2, 3, "s p p x p p x p p y p p x p p x p p y i p p e"),
    ],
)
def test_layouts(rows, columns, text):
    assert " ".join(NAMES[i] for i in images.layout(rows, columns, 2, IDS).tolist()) == text


def test_released_lengths_and_names():
    assert [len(images.layout(*tiles, 144, IDS)) for tiles in ((1, 1), (1, 2), (4, 4))] == [147, 437, 2467]
    assert dict(zip(IDS._fields, IMAGE_TOKENS)) == {
        "start": "<|image_start|>", "end": "<|image_end|>", "tile_x": "<|tile_x_separator|>",
        "tile_y": "<|tile_y_separator|>", "image": "<|image|>", "patch": "<|patch|>",
    }  # fmt: skip


# ------------------------------------------------------------ files


def gray16() -> Image.Image:
    return Image.fromarray(np.array([[0, 255, 256, 65535]], np.uint16))


def palette() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    return image


def rgba(*pixels) -> Image.Image:
    return Image.fromarray(np.array([pixels], np.uint8), "RGBA")


WHITE = (255, 255, 255)


@pytest.mark.parametrize(
    ("data", "pixels"),
    [
        (file([[0, 7, 255]]), [(0, 0, 0), (7, 7, 7), WHITE]),
        (file(Image.fromarray(np.array([[False, True]]))), [(0, 0, 0), WHITE]),
        (file(gray16()), [(0, 0, 0), (0, 0, 0), (1, 1, 1), WHITE]),
        # Alpha over white: 0 hides, 255 shows, 51 is a fifth.
        (file(rgba((9, 8, 7, 255), (9, 8, 7, 0), (0, 255, 100, 51))), [(9, 8, 7), WHITE, (204, 255, 224)]),
        (file(rgba((50, 50, 50, 255), (0, 0, 0, 0)).convert("LA")), [(50, 50, 50), WHITE]),
        (file(palette()), [(10, 20, 30), (40, 50, 60)]),
        (file(palette(), transparency=1), [(10, 20, 30), WHITE]),
        (file(palette(), "GIF"), [(10, 20, 30), (40, 50, 60)]),
        (file([[(1, 2, 3), (4, 5, 6)]], transparency=(4, 5, 6)), [(1, 2, 3), WHITE]),
        (file(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF"), [(255, 0, 0)]),
        (file([[(1, 2, 3)]], "WEBP", lossless=True), [(1, 2, 3)]),
        (b"P5 2 1 255\n\x05\x09", [(5, 5, 5), (9, 9, 9)]),
    ],
)
def test_every_mode_becomes_rgb(data, pixels):
    got = images.decode(data, "here")
    assert got.dtype == np.uint8 and got.tolist() == [list(map(list, pixels))]


def test_the_first_frame_of_an_animation():
    frames = [Image.new("L", (3, 2), value) for value in (40, 90, 200)]
    for kind in ("GIF", "WEBP", "PNG"):
        data = file(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert (images.decode(data, "here") == 40).all(), kind


def test_the_camera_s_orientation_is_applied():
    image = np.zeros((2, 3, 3), np.uint8)
    image[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: turn clockwise to see it upright
    turned = images.decode(file(image, exif=exif), "here")
    assert turned.shape == (3, 2, 3) and (turned[0, 1] == 255).all() and turned.sum() == 3 * 255


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it is that large, and holds next to nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "here: not an image; allowed: BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP"),
        (b"\0" * 99, "here: not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "here: not an image"),  # pillow would start a program
        (file(noise(64, 64), "JPEG")[:-400], "here: cannot be decoded: .*truncated"),
        (file(noise(64, 64))[:-400], "here: cannot be decoded: "),
        (file(noise(64, 64))[:40], "here: "),
        (bomb(9000, 8000), "here: 9000 x 8000 pixels; allowed: 67108864 in all"),
        (bomb(60000, 60000), "here: cannot be decoded: .*decompression bomb"),
        (bomb(100, 100), "here: cannot be decoded: "),
        (file(Image.new("F", (2, 2), 0.5), "TIFF"), "here: its pixels are floating-point numbers"),
    ],
)
def test_files_that_are_no_images_are_named(data, message):
    with pytest.raises(DataError, match=message):
        images.decode(data, "here")


def test_a_flipped_bit_is_an_error_or_an_image_but_nothing_else():
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
        good = file(noise(16, 16), kind)
        for at in rng.integers(0, len(good), 40):
            bad = bytearray(good)
            bad[at] ^= 1 << int(rng.integers(8))
            try:
                assert images.decode(bytes(bad), "here").shape[2] == 3
            except DataError as error:
                assert str(error).startswith("here: ")


# ------------------------------------------------------------ against the released preprocessing


def test_the_same_tiles_as_transformers(tmp_path):
    pytest.importorskip("torchvision")
    from transformers.models.llama4.image_processing_llama4 import Llama4ImageProcessor

    rng = np.random.default_rng(0)
    for case in range(60):
        size, max_tiles, largest = int(rng.choice([28, 56])), int(rng.choice([1, 2, 4, 9, 16])), bool(case % 2)
        height, width = (int(side) for side in np.exp(rng.uniform(0, np.log(300), 2)))
        image = noise(height, width, case)
        processor = Llama4ImageProcessor(
            size={"height": size, "width": size}, max_patches=max_tiles, resize_to_max_canvas=largest,
            do_rescale=False, do_normalize=False,
        )  # fmt: skip
        want = processor(Image.fromarray(image), return_tensors="pt")
        config = ImageConfig(size, 1, max_tiles, largest)
        tiles, rows, columns = images.cut(image, config)
        assert want["aspect_ratios"].tolist() == [[rows, columns]]
        off = np.abs(want["pixel_values"].numpy().astype(int) - tiles)
        # Two libraries round differently.
        assert off.max() <= 2 and (off > 0).mean() < 0.2, (height, width, config)
