"""The handwritten digits of scikit-learn (UCI Optical Recognition of Handwritten Digits), drawn larger and captioned.

The 1,797 images ship with the library, so that every machine has a corpus of images and text without the network. Only
this file uses scikit-learn.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.config.errors import DataError

DRAWING = 1
"""Raise it when the same digits would give other documents."""

SIDE = 32
"""Height and width of a drawing in pixels; about every eighth is twice as wide."""

SCALE = 3
"""Pixels per pixel of the original, which has 8 x 8."""

SHIFT = 2
"""Pixels from the middle, at most."""

COPIES = 3
"""Documents about each digit, each with its own drawing and caption."""

# A number has punctuation before and behind it, so that it is one token in any byte-level BPE, and the words before it
# announce a number. Captions name the digit, or give a hint with any number for which the hint is true.
NAMES = ("<|image|>The digit is ({}).", "Which digit is this?<|image|>It is a ({}).")
HINTS = {"above": "digit = read('<|image|>')  # above [{}]", "below": "<|image|>It is below ({})."}


class Digit(NamedTuple):
    text: str
    answer: tuple[int, int] | None
    """[start, end) of the digit's name in the text; None: the text gives a hint instead."""
    image: bytes
    """A PGM file: gray, white on black."""
    original: bytes
    """The digit before it was drawn, which all documents about it share."""


def read(limit: int | None = None) -> Iterator[Digit]:
    """COPIES documents about each of all digits, or of the first `limit`, in the library's order; always the same.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("source is digits; scikit-learn, which holds them, is not installed") from error
    data = load_digits()
    for number, (image, label) in enumerate(itertools.islice(zip(data.images, data.target), limit)):
        for copy in range(COPIES):
            rng = np.random.default_rng([DRAWING, number, copy])
            text, answer = _caption(int(label), rng)
            gray = _draw(image, rng)
            pgm = f"P5 {gray.shape[1]} {gray.shape[0]} 255\n".encode() + gray.tobytes()
            yield Digit(text, answer, pgm, image.astype(np.uint8).tobytes())


def _caption(label: int, rng: np.random.Generator) -> tuple[str, tuple[int, int] | None]:
    true = {"above": range(label), "below": range(label + 1, 10)}
    hint = ("above", "below")[int(rng.integers(2))]
    if rng.integers(2) and true[hint]:
        return HINTS[hint].format(rng.choice(true[hint])), None
    before, after = NAMES[rng.integers(len(NAMES))].split("{}")
    return f"{before}{label}{after}", (len(before), len(before) + 1)


def _draw(image: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.uint8]:
    """The 8 x 8 values from 0 to 16 as larger pixels on a black sheet, about the middle of its left or right half."""
    ink = np.kron(image * 255 / 16, np.ones((SCALE, SCALE))).round().astype(np.uint8)
    sheet = np.zeros((SIDE, SIDE * (2 if rng.integers(8) == 0 else 1)), np.uint8)
    top, left = (SIDE - len(ink)) // 2 + rng.integers(-SHIFT, SHIFT + 1, 2)
    left += SIDE * rng.integers(sheet.shape[1] // SIDE)
    sheet[top : top + len(ink), left : left + len(ink)] = ink
    return sheet
