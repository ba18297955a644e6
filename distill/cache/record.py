"""Atoms of whole samples to the payload columns of `layout`, and back."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.cache import golomb
from distill.cache.golomb import ALL_ZERO, Ints, exclusive
from distill.cache.layout import ENTROPY_LEVELS, LABEL_LEVELS, LABEL_TOP, NO_TARGET
from distill.cache.targets import Atoms

Array = NDArray[Any]


def encode_stat(values: Array, top: float, levels: int) -> Array:
    """uint8 codes of top * (code / levels)**2; |error| <= sqrt(top * value) / levels + top / (2 levels)**2."""
    return np.rint(np.sqrt(np.clip(values, 0.0, top) / top) * levels).astype(np.uint8)


def decode_stat(codes: Array, top: float, levels: int) -> Array:
    """float32 values."""
    table = top * (np.arange(256) / levels) ** 2
    return table.astype(np.float32)[codes]


def encode(
    atoms: Atoms, label_logprob_T: Array, entropy_T: Array, valid_T: Array, sample_tokens: int, rank_of_id: Array
) -> dict[str, Array]:
    """Payload columns and `ends` of T / S samples; tokens that are not valid keep no atoms. All inputs on the CPU."""
    samples = len(valid_T) // sample_tokens
    sample_T = np.arange(len(valid_T)) // sample_tokens
    entropy_top = math.log(len(rank_of_id))
    heads_T, tails_T = atoms.heads_T.numpy().astype(np.int64), atoms.tails_T.numpy().astype(np.int64)
    head_gaps, codes = _gaps(heads_T, atoms.head_ids_N, valid_T, rank_of_id, atoms.codes_N)
    tail_gaps, _ = _gaps(tails_T, atoms.tail_ids_M, valid_T, rank_of_id, None)

    valid_n = np.bincount(sample_T[valid_T], minlength=samples)
    counts = [heads_T[valid_T], tails_T[valid_T]]
    sums = [np.bincount(sample_T, np.where(valid_T, c, 0), samples).astype(np.int64) for c in (heads_T, tails_T)]
    bases = [_minimum(c, valid_n) for c in counts]
    columns = [c - np.repeat(base, valid_n) for c, base in zip(counts, bases, strict=True)] + [head_gaps, tail_gaps]
    runs_n4 = np.stack([valid_n, valid_n, *sums], axis=1)
    orders_n4 = np.stack([golomb.choose_orders(c, runs_n4[:, i]) for i, c in enumerate(columns)], axis=1)

    # What is stored, sample after sample, in each the four columns.
    stored_n4 = np.where(orders_n4 == ALL_ZERO, 0, runs_n4)
    values = np.empty(stored_n4.sum(), np.int64)
    starts_n4 = exclusive(stored_n4.ravel()).reshape(samples, 4)
    for i, column in enumerate(columns):
        kept = column[np.repeat(orders_n4[:, i] != ALL_ZERO, runs_n4[:, i])]
        values[_ragged(starts_n4[:, i], stored_n4[:, i])] = kept
    unary, unary_ends, low, low_ends = golomb.encode(values, stored_n4.ravel(), orders_n4.ravel(), samples)
    label = encode_stat(-label_logprob_T, LABEL_TOP, LABEL_LEVELS)
    entropy = encode_stat(entropy_T, entropy_top, ENTROPY_LEVELS)
    rest = atoms.rest_T.numpy()
    return {
        "orders": np.concatenate([orders_n4, *(b[:, None] for b in bases)], axis=1).astype(np.uint8),
        "label": np.where(valid_T, label, np.uint8(NO_TARGET)).reshape(samples, sample_tokens),
        "entropy": np.where(valid_T, entropy, np.uint8(0)).reshape(samples, sample_tokens),
        "rest": np.where(valid_T, rest, np.uint8(0)).reshape(samples, sample_tokens) if len(rest) else rest,
        "unary": unary,
        "low": low,
        "codes": codes,
        "ends": np.stack([unary_ends, low_ends, np.cumsum(sums[0])], axis=1).astype(np.uint32),
    }


def decode(columns: dict[str, Array], sizes_B3: Ints, ids_by_rank: Array) -> tuple[Atoms, Tensor, Tensor, Tensor]:
    """Payload columns of B samples (ragged ones end to end, with their sizes) to what `encode` took.

    Returns atoms, label_logprob_T, entropy_T, valid_T.
    """
    label, entropy, orders_B6 = columns["label"], columns["entropy"], columns["orders"].astype(np.int64)
    valid_BS = label != NO_TARGET
    valid_B = valid_BS.sum(1)
    coder = golomb.Decoder(columns["unary"], sizes_B3[:, 0], columns["low"], sizes_B3[:, 1])

    runs_B2 = np.stack([valid_B, valid_B], axis=1)
    counts = coder.read(runs_B2, orders_B6[:, :2]) + np.repeat(orders_B6[:, 4:].ravel(), runs_B2.ravel())
    is_head = np.repeat(np.tile([True, False], len(label)), runs_B2.ravel())
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

    atoms = Atoms(
        heads_T=torch.from_numpy(heads_T.astype(np.int32)),
        tails_T=torch.from_numpy(tails_T.astype(np.int32)),
        head_ids_N=torch.from_numpy(ids_by_rank[_ranks(gaps[is_head], heads)].astype(np.int32)),
        codes_N=torch.from_numpy(columns["codes"]),
        tail_ids_M=torch.from_numpy(ids_by_rank[_ranks(gaps[~is_head], tails)].astype(np.int32)),
        rest_T=torch.from_numpy(columns["rest"].reshape(-1)),
    )
    valid_T = valid_BS.ravel()
    label_T = np.where(valid_T, -decode_stat(label.ravel(), LABEL_TOP, LABEL_LEVELS), np.float32(0))
    entropy_T = decode_stat(entropy.ravel(), math.log(len(ids_by_rank)), ENTROPY_LEVELS)
    return atoms, torch.from_numpy(label_T), torch.from_numpy(entropy_T), torch.from_numpy(valid_T)


def _gaps(
    counts_T: Ints, ids: Tensor, valid_T: Array, rank_of_id: Array, codes: Tensor | None
) -> tuple[Ints, NDArray[np.uint8]]:
    """Gaps of ascending ranks in each valid token, and the codes in that order."""
    token = np.repeat(np.arange(len(counts_T)), counts_T)
    keep = valid_T[token]
    # One sort for all tokens: token, rank and code in one word.
    key = (token << 32) | (rank_of_id[ids.numpy()].astype(np.int64) << 8)
    if codes is not None:
        key |= codes.numpy()
    key = np.sort(key[keep])
    rank = (key >> 8) & 0xFFFFFF
    counts = counts_T[valid_T]
    gaps = np.diff(rank, prepend=0) - 1
    first = exclusive(counts)[counts > 0]
    gaps[first] = rank[first]
    assert (gaps >= 0).all(), "an id twice among the atoms of a token"
    return gaps, (key & 0xFF).astype(np.uint8)


def _ranks(gaps: Ints, counts: Ints) -> Ints:
    """Inverse of `_gaps`: running sums that start anew at each token."""
    running = np.cumsum(gaps + 1)
    starts = exclusive(counts)
    before = np.concatenate([[0], running])[starts]
    return running - np.repeat(before, counts) - 1


def _minimum(values: Array, runs: Ints) -> Ints:
    """Smallest value of each run, at most 255; 0 for an empty one."""
    base = np.zeros(len(runs), np.int64)
    if len(values):
        base[runs > 0] = np.minimum.reduceat(values, exclusive(runs)[runs > 0])
    return np.minimum(base, 255)


def _ragged(starts: Ints, sizes: Ints) -> Ints:
    """Indices start, start + 1, ... of each run, end to end."""
    return np.arange(sizes.sum()) + np.repeat(starts - exclusive(sizes), sizes)
