"""Encodes atoms and statistics of whole samples as records, one contiguous run of bytes each, and decodes them."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.cache import coder
from distill.cache.codecs import Codec
from distill.cache.format import ENTROPY_LEVELS, LABEL_LEVELS, LABEL_TOP
from distill.cache.targets import Atoms

Array = NDArray[Any]

_FRESH = coder.fresh()
_PER_BYTE = 1200
"""More symbols than a byte of a record can hold."""


class Encoded(NamedTuple):
    """Records of n samples."""

    records: NDArray[np.uint8]
    """The bytes of all records, sample after sample."""
    ends: NDArray[np.int64]
    """[n]: the end of each record in `records`."""
    atoms: NDArray[np.int64]
    """[n]: atoms in each record."""


class Decoded(NamedTuple):
    """The arguments of `encode`; atoms of a token are in the order of their ranks."""

    atoms: Atoms
    label_logprob_T: Tensor
    entropy_T: Tensor
    valid_T: Tensor


class Raw(NamedTuple):
    """One record as it lies in its shard."""

    data: bytes
    atoms: int


def encode_stat(values: Array, top: float, levels: int) -> NDArray[np.uint8]:
    """Codes of top * (code / levels)**2; |error| <= sqrt(top * value) / levels + top / (2 levels)**2."""
    return np.rint(np.sqrt(np.clip(values, 0.0, top) / top) * levels).astype(np.uint8)


def decode_stat(codes: Array, top: float, levels: int) -> NDArray[np.float32]:
    """The values of codes that `encode_stat` made, each with its error."""
    table: NDArray[np.float32] = (top * (np.arange(256) / levels) ** 2).astype(np.float32)
    return table[codes]


def encode(
    atoms: Atoms, label_logprob_T: Array, entropy_T: Array, valid_T: Array, sample_tokens: int, rank_of_id: Array,
    codec: Codec,
) -> Encoded:  # fmt: skip
    """Records of T / S samples; tokens that are not valid keep no atoms. All inputs on the CPU."""
    tokens, count = len(valid_T), len(atoms.ids_N)
    counts_T = atoms.counts_T.numpy()
    per_sample = np.add.reduceat(counts_T, np.arange(0, tokens, sample_tokens)) if tokens else counts_T
    assert len(atoms.codes_N) == count == counts_T.sum(), "atoms and their counts differ"
    assert counts_T[valid_T].max(initial=0) <= codec.max_atoms, "more atoms in a token than the codec makes"
    size = coder.SAMPLE_BYTES + coder.TOKEN_BYTES * sample_tokens + coder.ATOM_BYTES * int(per_sample.max(initial=0))
    out = np.empty(
        coder.SAMPLE_BYTES * len(per_sample) + coder.TOKEN_BYTES * tokens + coder.ATOM_BYTES * count, np.uint8
    )
    ends, kept = coder.encode(
        valid_T,
        encode_stat(-label_logprob_T, LABEL_TOP, LABEL_LEVELS),
        encode_stat(entropy_T, math.log(len(rank_of_id)), ENTROPY_LEVELS),
        counts_T,
        atoms.ids_N.numpy(),
        atoms.codes_N.numpy(),
        atoms.rest_T.numpy(),
        rank_of_id,
        codec.total > 0,
        sample_tokens,
        _FRESH,
        out,
        np.zeros(size, np.uint8),
    )
    assert not len(ends) or ends[0] >= 0, "an id twice among the atoms of a token"
    return Encoded(out[: ends[-1]].copy() if len(ends) else out, ends, kept)


def decode(raws: Sequence[Raw], sample_tokens: int, ids_by_rank: Array, codec: Codec) -> Decoded:
    """Inverse of `encode` for the records of any samples; ValueError with the index of one that is not a record."""
    samples, tokens = len(raws), len(raws) * sample_tokens
    atoms_B = np.array([raw.atoms for raw in raws], np.int64)
    # Reserves no more memory than the bytes can fill: no symbol has more than 32,610 of 32,768 parts, 0.007 bits.
    room_B = np.array([len(raw.data) + 8 for raw in raws], np.int64) * _PER_BYTE
    too_many_B = (atoms_B > np.minimum(room_B, sample_tokens * codec.max_atoms)) | (sample_tokens > room_B)
    for index in np.flatnonzero(too_many_B):
        raise ValueError(int(index))
    data = np.frombuffer(b"".join([raw.data for raw in raws]), np.uint8)
    ends_B = np.cumsum([len(raw.data) for raw in raws], dtype=np.int64)
    starts_B = np.concatenate([np.zeros(1, np.int64), ends_B[:-1]])[:samples]
    count = int(atoms_B.sum())
    valid_T, label_T, entropy_T = np.zeros(tokens, np.bool_), np.zeros(tokens, np.uint8), np.zeros(tokens, np.uint8)
    counts_T, rest_T = np.zeros(tokens, np.int32), np.zeros(tokens if codec.has_rest else 0, np.uint8)
    ids_N, codes_N = np.empty(count, np.int32), np.empty(count, np.int32)
    bad = coder.decode(
        data, starts_B, ends_B, atoms_B, ids_by_rank, codec.total, codec.max_code, codec.max_atoms, codec.has_rest,
        sample_tokens, _FRESH, valid_T, label_T, entropy_T, counts_T, ids_N, codes_N, rest_T,
    )  # fmt: skip
    if bad >= 0:
        raise ValueError(bad)
    atoms = Atoms(*map(torch.from_numpy, (counts_T, ids_N, codes_N, rest_T)))
    label_logprob_T = np.where(valid_T, -decode_stat(label_T, LABEL_TOP, LABEL_LEVELS), np.float32(0))
    entropies_T = decode_stat(entropy_T, math.log(len(ids_by_rank)), ENTROPY_LEVELS)
    return Decoded(atoms, *map(torch.from_numpy, (label_logprob_T, entropies_T, valid_T)))
