"""The table of corpus-frequency ranks: frequent ids get small numbers, which take few bits. No torch."""

from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from distill.cache.format import ranks_name
from distill.cache.header import CacheHeader
from distill.cache.seal import digest
from distill.cache.store import Store
from distill.config.errors import CacheError


def rank_table(counts_V: Any, vocab_size: int) -> bytes:
    """The table's file: ids by falling count, equal counts by id.

    counts_V: array, tensor or list.

    Raises:
        CacheError: counts of another vocabulary.
    """
    counts_V = np.asarray(counts_V)
    if counts_V.shape != (vocab_size,):
        raise CacheError(f"counts_V has shape {counts_V.shape}; the vocabulary has {vocab_size} ids")
    ids_by_rank = np.argsort(-counts_V.astype(np.int64), kind="stable")
    return safetensors.numpy.save({"ids_by_rank": ids_by_rank.astype(np.uint32)})


def load_ranks(store: Store, header: CacheHeader) -> NDArray[np.uint32]:
    """ids_by_rank [V], verified against the digest in the header; without a table, rank = id.

    Raises:
        CacheError: the file is missing or damaged.
    """
    if not header.ranks:
        return np.arange(header.vocab_size, dtype=np.uint32)
    name = ranks_name(header.ranks)
    data = store.read(name)
    if digest(data) != header.ranks:
        raise CacheError(
            f"{store.path(name)} is damaged: its digest is {digest(data)}, {header.ranks} in the cache's header"
        )
    try:
        ids_by_rank: NDArray[np.uint32] = safetensors.numpy.load(data)["ids_by_rank"]
        # The length first, so that a wrong vocabulary in the header does not decide how much memory is reserved.
        if ids_by_rank.dtype != np.uint32 or ids_by_rank.shape != (header.vocab_size,):
            raise ValueError(f"{ids_by_rank.dtype} {list(ids_by_rank.shape)} in place of {header.vocab_size} ids")
        if not np.array_equal(np.sort(ids_by_rank), np.arange(header.vocab_size)):
            raise ValueError(f"not every id below {header.vocab_size} once")
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CacheError(f"{store.path(name)} is damaged: {error!s:.300}") from error
    return ids_by_rank


def invert(ids_by_rank: NDArray[np.uint32]) -> NDArray[np.int64]:
    """rank_of_id [V]."""
    rank_of_id = np.empty(len(ids_by_rank), np.int64)
    rank_of_id[ids_by_rank] = np.arange(len(ids_by_rank))
    return rank_of_id
