"""The digest of a sample's tokens, which binds a record to them. No torch."""

import sys
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray


def token_digests(ids_BS: NDArray[Any], *more_BS: NDArray[Any]) -> NDArray[np.uint64]:
    """uint64 [B]: xxh3-64 of each sample's ids as little-endian int32, then its rows of the other arrays as they are.

    The digest has to cover all that decides what the teacher predicts: ids alone where a sample is one document, ids
    and the bounds of documents where attention ends at them. Writer and reader have to compute it alike.
    """
    assert sys.byteorder == "little"
    arrays = [np.asarray(ids_BS, "<i4"), *more_BS]
    rows = np.concatenate([np.ascontiguousarray(array).view(np.uint8) for array in arrays], axis=1)
    return np.array([xxhash.xxh3_64_intdigest(row) for row in rows], np.uint64)
