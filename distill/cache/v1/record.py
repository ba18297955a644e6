"""Records of format 1 to atoms. The format:

    orders      [6]              the coder's order of each of four number columns (below), base of the first two
    label       [S]              -log p(label) = 32 (c / 254)^2, or 255: the token has no target, and no atoms
    entropy     [S]              log V (c / 255)^2
    rest        [S] or [0]       the codec's code of the residual mass
    unary, low  [bytes]          number columns, coded
    codes       [bytes]          one byte for each head atom, in the order of its id's column

The four number columns, over the sample's tokens that have a target: how many head atoms (less the base); how many
tail atoms (less the base); gaps of head ids; gaps of tail ids. An id is stored as its rank; ranks of a token ascend,
and a gap is rank - previous rank - 1, the previous of the first being -1. `golomb` gives the code of the numbers: w = v
+ 2^k has b + 1 bits; b - k zeros and a one go to `unary`, the b low bits of w to `low`, both most significant bit
first. Order 255 says that all numbers of the column are 0 and nothing is stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distill.cache.record import Decoded, decode_stat
from distill.cache.targets import Atoms
from distill.cache.v1 import golomb
from distill.cache.v1.golomb import Ints, exclusive
from distill.cache.v1.shard import PAYLOAD, RAGGED
from distill.config.schema import CodecName

Array = NDArray[Any]

_MOST_ATOMS = 1000
NO_TARGET, LABEL_LEVELS, LABEL_TOP, ENTROPY_LEVELS = 255, 254, 32.0, 255


def decode(records: Sequence[dict[str, Array]], ids_by_rank: Array, codec: CodecName) -> Decoded:
    """The atoms and statistics of B samples."""
    columns = {name: np.concatenate([record[name] for record in records]) for name in PAYLOAD}
    sizes_B3 = np.array([[len(record[name]) for name in RAGGED] for record in records])
    label, entropy = (columns[name].reshape(len(records), -1) for name in ("label", "entropy"))
    orders_B6 = columns["orders"].reshape(-1, 6).astype(np.int64)
    valid_BS = label != NO_TARGET
    valid_B = valid_BS.sum(1)
    coder = golomb.Decoder(columns["unary"], sizes_B3[:, 0], columns["low"], sizes_B3[:, 1])

    runs_B2 = np.stack([valid_B, valid_B], axis=1)
    counts = coder.read(runs_B2, orders_B6[:, :2]) + np.repeat(orders_B6[:, 4:].ravel(), runs_B2.ravel())
    is_head = np.repeat(np.tile([True, False], len(label)), runs_B2.ravel())
    if counts.max(initial=0) > _MOST_ATOMS:
        raise ValueError("more atoms in a token than any codec makes")
    heads, tails = counts[is_head], counts[~is_head]
    heads_T, tails_T = np.zeros(label.size, np.int64), np.zeros(label.size, np.int64)
    heads_T[valid_BS.ravel()], tails_T[valid_BS.ravel()] = heads, tails

    runs_B2 = np.stack([heads_T.reshape(label.shape).sum(1), tails_T.reshape(label.shape).sum(1)], axis=1)
    if (runs_B2[:, 0] != sizes_B3[:, 2]).any():
        raise ValueError("head atoms and their codes differ in number")
    gaps = coder.read(runs_B2, orders_B6[:, 2:4])
    is_head = np.repeat(np.tile([True, False], len(label)), runs_B2.ravel())
    if coder.left.any():
        raise ValueError("fewer numbers than the record holds")

    # Heads and tails of a token side by side. A tail's code is 0; a head's of `threshold` now begins at 1.
    token = np.concatenate([np.repeat(np.arange(label.size), counts) for counts in (heads_T, tails_T)])
    order = np.argsort(token, kind="stable")
    ranks = np.concatenate([_ranks(gaps[is_head], heads), _ranks(gaps[~is_head], tails)])[order]
    codes = columns["codes"].astype(np.int32) + (codec is CodecName.threshold)
    atoms = Atoms(
        counts_T=torch.from_numpy((heads_T + tails_T).astype(np.int32)),
        ids_N=torch.from_numpy(ids_by_rank[ranks].astype(np.int32)),
        codes_N=torch.from_numpy(np.concatenate([codes, np.zeros(tails_T.sum(), np.int32)])[order]),
        rest_T=torch.from_numpy(columns["rest"]),
    )
    valid_T = valid_BS.ravel()
    label_T = np.where(valid_T, -decode_stat(label.ravel(), LABEL_TOP, LABEL_LEVELS), np.float32(0))
    entropy_T = decode_stat(entropy.ravel(), math.log(len(ids_by_rank)), ENTROPY_LEVELS)
    return Decoded(atoms, *map(torch.from_numpy, (label_T, entropy_T, valid_T)))


def _ranks(gaps: Ints, counts: Ints) -> Ints:
    """Inverse of `_gaps`: running sums that start anew at each token."""
    running = np.cumsum(gaps + 1)
    starts = exclusive(counts)
    before = np.concatenate([[0], running])[starts]
    return running - np.repeat(before, counts) - 1
