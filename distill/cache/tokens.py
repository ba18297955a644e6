"""The digest by which a cache knows a sample's tokens again. No torch."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray


def token_digests(ids_BS: NDArray[Any], *more_BS: NDArray[Any]) -> NDArray[np.uint64]:
    """uint64 [B]: xxh3-64 of each sample's ids as little-endian int32, then its rows of the other arrays as they are.

    Whatever changes what the teacher predicts at a place belongs in: ids alone where a sample is one document; the
    bounds of documents, say, where attention stops at them. Writer and reader must compute it alike.
    """
    assert sys.byteorder == "little"
    arrays = [np.asarray(ids_BS, "<i4"), *more_BS]
    rows = np.concatenate([np.ascontiguousarray(array).view(np.uint8) for array in arrays], axis=1)
    return np.array([xxhash.xxh3_64_intdigest(row) for row in rows], np.uint64)
