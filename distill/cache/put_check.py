"""Checks of what callers put into a cache, before anything is stored or reaches compiled code.

What comes for tokens without a target is not stored, so of it only the lengths are checked.
"""

from __future__ import annotations

import math
from operator import index
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.cache.codecs import Codec
from distill.cache.header import CacheHeader
from distill.cache.pending import Pending
from distill.cache.targets import Atoms
from distill.config.errors import CacheError

Array = NDArray[Any]

_MAX_STEP = 2**32 - 1
_ROUNDING = 0.01
"""Nats beyond what is possible that sums in float32 may give."""
_MAX_TEACHER = 1000
"""Characters of a teacher's identity."""


class PutCheck:
    """Takes copies of a caller's micro-batches, checked; every error is a CacheError that names the cache."""

    def __init__(self, header: CacheHeader, codec: Codec):
        self._header, self._codec, self._width = header, codec, header.sample_tokens

    def sample_ids(self, values: Any) -> NDArray[np.int64]:
        """int64 [B] of one id, or a list, array or tensor of ids; CacheError: one that the corpus does not have."""
        return known_ids(self._whole("sample_ids_B", values), self._header)

    def batch(
        self, ids: Any, digests: Any, atoms: Atoms, label_logprob: Any, entropy: Any, valid: Any, step: int,
        tokens_seen: int, teacher: str,
    ) -> Pending:  # fmt: skip
        """A copy of the arguments of `CacheWriter.put`; CacheError names sample and position of what is no target."""
        ids_B = self.sample_ids(ids)
        digests_B = self._whole("digests_B", digests)
        counts_T, ids_N, codes_N, rest_T = (
            self._whole(f"atoms.{name}", column) for name, column in zip(Atoms._fields, atoms, strict=True)
        )
        label_T, entropy_T = self._floats("label_logprob_T", label_logprob), self._floats("entropy_T", entropy)
        valid_T, tokens = self._mask(valid), len(ids_B) * self._width
        shapes = dict(
            digests_B=(digests_B, len(ids_B)), label_logprob_T=(label_T, tokens), entropy_T=(entropy_T, tokens),
            valid_T=(valid_T, tokens), counts_T=(counts_T, tokens), codes_N=(codes_N, len(ids_N)),
            rest_T=(rest_T, tokens if self._codec.has_rest else 0),
        )  # fmt: skip
        for name, (column, length) in shapes.items():
            if column.shape != (length,):
                raise self._error(
                    f"{name} is {list(column.shape)}, expected [{length}]: {len(ids_B)} samples of {self._width} "
                    f"tokens, {len(ids_N)} atoms"
                )
        for i in np.flatnonzero(digests_B < 0).tolist():
            raise self._error(f"sample {ids_B[i]} has digest {digests_B[i]}; token_digests gives uint64")
        for name, value, most in (("step", step, _MAX_STEP), ("tokens_seen", tokens_seen, 2**63 - 1)):
            if not hasattr(value, "__index__") or not 0 <= index(value) <= most:
                raise self._error(f"{name} is {value!r:.80}; allowed are whole numbers from 0 to {most}")
        if not isinstance(teacher, str) or not teacher.isprintable() or len(teacher) > _MAX_TEACHER:
            raise self._error(f"teacher is {teacher!r:.80}; allowed are up to {_MAX_TEACHER} printable characters")
        for name, column in (("label_logprob_T", label_T), ("entropy_T", entropy_T)):
            self._refuse(ids_B, valid_T & ~np.isfinite(column), f"{name} is not finite", column)
            column[~valid_T] = 0
        self._check_atoms(ids_B, valid_T, counts_T, ids_N, codes_N, rest_T)
        even = math.log(self._header.vocab_size)
        bad_T = (entropy_T < -_ROUNDING) | (entropy_T > even + _ROUNDING)
        self._refuse(ids_B, label_T > _ROUNDING, "label_logprob_T is above 0 nats", label_T)
        self._refuse(ids_B, bad_T, f"entropy_T is not from 0 to {even:.4g} nats", entropy_T)
        columns = (counts_T.astype(np.int32), ids_N.astype(np.int32), codes_N.astype(np.int32), rest_T.astype(np.uint8))
        return Pending(
            ids_B, digests_B.astype(np.uint64), Atoms(*map(torch.from_numpy, columns)), label_T, entropy_T, valid_T,
            index(step), index(tokens_seen), teacher,
        )  # fmt: skip

    def check(self, batch: Pending) -> Pending:
        """The same for what a checkpoint has kept."""
        return self.batch(*batch)

    def labels(self, ids_B: Array, logits_TV: Tensor, labels: Any, valid: Any) -> Tensor:
        """int64 [T]: labels of valid tokens, which have to be ids, and id 0 of others; the logits' shape is checked."""
        labels_T, valid_T = self._whole("labels_T", labels), self._mask(valid)
        tokens, vocab = len(ids_B) * self._width, self._header.vocab_size
        if not logits_TV.is_floating_point():
            raise self._error(f"logits_TV must hold floating-point numbers, not {logits_TV.dtype}")
        shapes = (tuple(logits_TV.shape), labels_T.shape, valid_T.shape)
        if shapes != ((tokens, vocab), (tokens,), (tokens,)):
            raise self._error(
                f"logits_TV, labels_T and valid_T are {', '.join(str(list(shape)) for shape in shapes)}; "
                f"{len(ids_B)} samples of {self._width} tokens need {[tokens, vocab]}, [{tokens}], [{tokens}]"
            )
        bad_T = valid_T & ((labels_T < 0) | (labels_T >= vocab))
        self._refuse(ids_B, bad_T, f"label is not from 0 to {vocab - 1}", labels_T)
        return torch.from_numpy(np.where(valid_T, labels_T, 0).astype(np.int64))

    def last_of_each(self, batch: Pending) -> NDArray[np.bool_]:
        """bool [B]: all but samples that come once more in the batch; CacheError: with other tokens."""
        ids_B = batch.sample_ids_B
        last_B = np.zeros(len(ids_B), np.bool_)
        last_B[len(ids_B) - 1 - np.unique(ids_B[::-1], return_index=True)[1]] = True
        for i in np.flatnonzero(~last_B).tolist():
            if len(digests := np.unique(batch.digests_B[ids_B == ids_B[i]])) > 1:
                raise self._error(
                    f"sample {ids_B[i]} comes twice, with digests {digests[0]:016x} and {digests[1]:016x}"
                )
        return last_B

    def _check_atoms(
        self, ids_B: Array, valid_T: Array, counts_T: Array, ids_N: Array, codes_N: Array, rest_T: Array
    ) -> None:
        codec, vocab = self._codec, self._header.vocab_size
        bad_T = (counts_T < 0) | (counts_T > len(ids_N))
        self._refuse(ids_B, bad_T, f"counts_T is not from 0 to the number of atoms, {len(ids_N)}", counts_T)
        counts_T = counts_T.astype(np.int64)
        if counts_T.sum() != len(ids_N):
            raise self._error(f"counts_T sums to {counts_T.sum()}, but there are {len(ids_N)} atoms")
        bad_T = valid_T & (counts_T > codec.max_atoms)
        self._refuse(ids_B, bad_T, f"more atoms than the codec makes, {codec.max_atoms}", counts_T)
        if len(rest_T):
            self._refuse(ids_B, valid_T & ((rest_T < 0) | (rest_T > 255)), "rest_T is not from 0 to 255", rest_T)
        least = 1 if codec.total else 0
        for name, column, low, high in (("id", ids_N, 0, vocab - 1), ("code", codes_N, least, codec.max_code)):
            if len(column) and not low <= column.min() <= column.max() <= high:
                self._refuse_atoms(
                    ids_B, valid_T, counts_T, (column < low) | (column > high),
                    f"{name} is not from {low} to {high}", column,
                )  # fmt: skip
        some_T = np.flatnonzero(counts_T)
        starts = np.cumsum(counts_T)[some_T] - counts_T[some_T]
        if codec.total:
            sums_T = np.zeros(len(counts_T), np.int64)
            sums_T[some_T] = np.add.reduceat(codes_N, starts, dtype=np.int64) if len(starts) else 0
            bad_T = valid_T & (sums_T != codec.total)
            self._refuse(ids_B, bad_T, f"codes do not sum to {codec.total} draws, but to", sums_T)
        falls_N = np.zeros(len(ids_N), np.bool_)
        falls_N[1:] = ids_N[1:] <= ids_N[:-1]
        falls_N[starts] = False
        if falls_N.any():  # most codecs give ids in order
            tokens_N = np.repeat(np.arange(len(counts_T)), counts_T)
            valid_N = np.repeat(valid_T, counts_T)
            keys = np.sort(tokens_N[valid_N] << 24 | ids_N[valid_N].astype(np.int64))
            for key in keys[1:][keys[1:] == keys[:-1]][:1].tolist():
                raise self._error(f"an id comes twice: {key % 2**24}", ids_B, key >> 24)

    def _refuse_atoms(
        self, ids_B: Array, valid_T: Array, counts_T: Array, bad_N: Array, problem: str, values_N: Array
    ) -> None:
        bad_N = bad_N & np.repeat(valid_T, counts_T)
        if bad_N.any():
            first = int(np.argmax(bad_N))
            token = int(np.searchsorted(np.cumsum(counts_T), first, side="right"))
            raise self._error(f"{problem}: {values_N[first]}", ids_B, token)

    def _refuse(self, ids_B: Array, bad_T: Array, problem: str, values_T: Array) -> None:
        if bad_T.any():
            token = int(np.argmax(bad_T))
            raise self._error(f"{problem}: {values_T[token]}", ids_B, token)

    def _error(self, problem: str, ids_B: Array | None = None, token: int = 0) -> CacheError:
        place = "" if ids_B is None else f"sample {ids_B[token // self._width]}, position {token % self._width}: "
        return CacheError(f"cache {self._header.folder}: {place}{problem}")

    # ------------------------------------------------------------ kinds of numbers

    def _whole(self, name: str, values: Any) -> Array:
        """Whole numbers of one, or of a list, array or tensor; CacheError: they are something else."""
        try:
            return whole_numbers(values)
        except ValueError as error:
            raise self._error(f"{name} {error}") from None

    def _floats(self, name: str, values: Any) -> Array:
        """A float32 copy."""
        try:
            with np.errstate(over="ignore"):  # infinity is refused where it matters
                if isinstance(values, Tensor) and not values.is_complex():
                    values = values.detach().float().cpu().numpy()
                if np.asarray(values).dtype.kind in "cSU":
                    raise TypeError
                return np.array(values, np.float32)
        except (TypeError, ValueError):
            raise self._error(f"{name} must hold floating-point numbers, not {values!r:.80}") from None

    def _mask(self, values: Any) -> Array:
        """A bool copy."""
        array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
        if array.size and array.dtype != np.bool_ and (array.dtype.kind == "c" or not np.isin(array, (0, 1)).all()):
            raise self._error(f"valid_T must hold booleans, not {values!r:.80}")
        return np.array(array, np.bool_)


def whole_numbers(values: Any) -> Array:
    """The whole numbers of one, or of a list, array or tensor, in a row; ValueError: they are something else."""
    try:
        array = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
        if not isinstance(array, np.ndarray | np.generic):
            numbers = [index(each) for each in array] if hasattr(array, "__iter__") else [index(array)]
            array = np.array(numbers, np.uint64 if numbers and min(numbers) >= 0 else np.int64)
        if array.size and (array.dtype.kind not in "iu" or array.ndim > 1):
            raise TypeError(array.dtype)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"must hold whole numbers of 64 bits in a row, not {values!r:.80}") from None
    return np.atleast_1d(array) if array.size else np.empty(0, np.int64)


def known_ids(ids_B: Array, header: CacheHeader) -> NDArray[np.int64]:
    """The sample ids as int64; CacheError: one that the corpus does not have."""
    for bad in ids_B[(ids_B < 0) | (ids_B >= header.samples)][:1]:
        raise CacheError(f"cache {header.folder}: sample is {bad}; sample ids must lie in 0 to {header.samples - 1}")
    return ids_B.astype(np.int64)
