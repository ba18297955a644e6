"""The handwritten digits of scikit-learn (UCI Optical Recognition of Handwritten Digits), drawn larger and captioned.

1,797 pictures that ship with the library: a corpus of pictures and text on every machine, without the network. The only
file that knows scikit-learn.
"""

from __future__ import annotations

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

# Before the answer comes punctuation and after it a sign, so that in any byte-level BPE a digit is one token, and the
# words before it tell that a digit is next but not which.
CAPTIONS = (
    "<|image|>The digit is ({}).",
    "Which digit is this?<|image|>It is a ({}).",
    "<|image|>def digit(): return [{}]",
    "digit = read('<|image|>')  # [{}]",
)


class Digit(NamedTuple):
    text: str
    answer: tuple[int, int]
    """[start, end) of the digit in the text."""
    picture: bytes
    """A PGM file: grey, white on black."""


def read(limit: int | None = None) -> Iterator[Digit]:
    """All digits, or the first `limit`, in the library's order; always the same.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("source is digits; scikit-learn, which has them, is not installed") from error
    found = load_digits()
    for number, (image, label) in enumerate(itertools.islice(zip(found.images, found.target), limit)):
        rng = np.random.default_rng([DRAWING, number])
        before, after = CAPTIONS[rng.integers(len(CAPTIONS))].split("{}")
        answer = (len(before), len(before) + 1)
        yield Digit(f"{before}{label}{after}", answer, _pgm(_draw(image, rng)))


def _draw(image: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.uint8]:
    """The 8 x 8 values from 0 to 16 as larger pixels on a black sheet, about the middle of its left or right half."""
    ink = np.kron(image * 255 / 16, np.ones((SCALE, SCALE))).round().astype(np.uint8)
    sheet = np.zeros((SIDE, SIDE * (2 if rng.integers(8) == 0 else 1)), np.uint8)
    top, left = (SIDE - len(ink)) // 2 + rng.integers(-SHIFT, SHIFT + 1, 2)
    left += SIDE * rng.integers(sheet.shape[1] // SIDE)
    sheet[top : top + len(ink), left : left + len(ink)] = ink
    return sheet


def _pgm(grey: NDArray[np.uint8]) -> bytes:
    height, width = grey.shape
    return f"P5 {width} {height} 255\n".encode() + grey.tobytes()
