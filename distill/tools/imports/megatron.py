"""Megatron-LM's cached logits: `cp{C}_dp{D}__{iteration}.tar`, one file per rank and stretch of iterations.

In a tar `_meta.json` comes first, then `{iteration}.pt.zst` for each: a dictionary of torch, compressed with zstd, of
three lists with one tensor per micro-batch, [positions, sequences, entries] each: `values` (log-probabilities over the
whole vocabulary), `indices_low` (uint16) and `bit_17` (bool), together the ids. With top-p, entries outside the nucleus
have the value -1000.

Tokens are not in it, nor are ids of samples: a sequence is known by its place in the order of training alone. That is,
iteration by iteration, micro-batch by micro-batch of all data-parallel ranks in turn (rank 0 has the first, rank 1 the
second, ...), and within it in the order of the batch. Context-parallel ranks hold parts of the same sequences: of 2 C
equal parts, rank c holds parts c and 2 C - 1 - c.
"""

import io
import json
import re
import tarfile
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from distill.config.errors import CacheError
from distill.tools.imports import parquet_rows as tables
from distill.tools.imports.sequences import NO_TAIL, ForeignSequence, SourceInfo, entries

META = "_meta.json"
_NAME = re.compile(r"cp(\d+)_dp(\d+)__(\d+)\.tar")
_MEMBER = re.compile(r"(\d+)\.pt\.zst")
_LISTS = ("values", "indices_low", "bit_17")
_OUTSIDE = -999.0
"""Values below are not probabilities but the mark of an entry outside the nucleus (-1000, however it is rounded)."""

Micro = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Values and ids of one micro-batch, [positions, sequences, entries]."""


class Megatron:
    """Reads a folder of tars, or the tars of one run, in the order of training.

    k: keep fewer.

    Raises:
        CacheError: no such tars, ranks that lack files, or (while reading) iterations missing, twice, or damaged.
    """

    def __init__(self, paths: list[str | Path], *, k: int | None = None):
        files = tables.files_of(paths, "cp*_dp*__*.tar")
        self._ranks: dict[tuple[int, int], list[Path]] = {}
        for file in files:
            found = _NAME.fullmatch(file.name)
            if not found:
                raise CacheError(f"{file}: not a file of cached logits; they are called cp<C>_dp<D>__<iteration>.tar")
            c, d, _ = map(int, found.groups())
            self._ranks.setdefault((c, d), []).append(file)
        for ranked in self._ranks.values():
            ranked.sort(key=lambda file: int(_NAME.fullmatch(file.name)[3]))  # type: ignore[index]
        self._cp, self._dp = (max(rank[i] for rank in self._ranks) + 1 for i in (0, 1))
        for c in range(self._cp):
            for d in range(self._dp):
                if (c, d) not in self._ranks:
                    raise CacheError(
                        f"{files[0].parent}: no cp{c}_dp{d}__*.tar, though there are {self._cp} context-parallel and "
                        f"{self._dp} data-parallel ranks by the other names"
                    )
        meta = _meta(self._ranks[0, 0][0])
        saver = meta.get("saver")
        if not isinstance(saver, dict) or type(saver.get("k")) is not int or saver["k"] < 1:
            raise CacheError(f"{self._ranks[0, 0][0]}: {META} lacks the number of entries that were kept (saver.k)")
        self._k = min(k or saver["k"], saver["k"])
        nucleus = f", cut to a nucleus of {saver['p']}" if saver.get("p") is not None else ""
        bias = (
            f"top-{self._k}{nucleus} of log-probabilities over the whole vocabulary in {saver.get('save_dtype')}; "
            f"{NO_TAIL}; tokens are not stored: which sample a sequence is, is taken from the order given"
        )
        self.info = SourceInfo("megatron", bias, self._k)

    def __iter__(self) -> Iterator[ForeignSequence]:
        last: int | None = None
        for each in zip_longest(*map(_iterations, self._ranks.values())):
            heads = dict(zip(self._ranks, each, strict=True))
            lead = heads[0, 0]
            for (c, d), head in heads.items():
                if (head and head[0]) != (lead and lead[0]):
                    raise CacheError(
                        f"{self._ranks[c, d][-1]}: after iteration {last} cp{c}_dp{d} has {_named(head)}, cp0_dp0 has "
                        f"{_named(lead)}"
                    )
            iteration, tar, _ = lead
            if last is not None and iteration != last + 1:
                raise CacheError(
                    f"{tar}: iteration {iteration} follows {last}: every place after it would be that of another sample"
                )
            last = iteration
            yield from self._of_iteration(heads, iteration, tar)

    def _of_iteration(
        self, heads: dict[tuple[int, int], tuple[int, Path, list[Micro]]], iteration: int, tar: Path
    ) -> Iterator[ForeignSequence]:
        where = f"{tar} iteration {iteration}"
        if len({len(micros) for _, _, micros in heads.values()}) != 1:
            raise CacheError(f"{where}: ranks differ in their number of micro-batches")
        for j in range(len(heads[0, 0][2])):
            for d in range(self._dp):
                values, ids = _joined([heads[c, d][2][j] for c in range(self._cp)], f"{where} dp{d} micro-batch {j}")
                for b in range(values.shape[1]):
                    place = f"{where} dp{d} micro-batch {j} sequence {b}"
                    value, token = values[:, b].ravel(), ids[:, b].ravel()
                    inside = value > _OUTSIDE
                    counts = inside.reshape(values.shape[0], -1).sum(1)
                    yield ForeignSequence(place, None, entries(counts, token[inside], value[inside], place, self._k))


def _iterations(files: list[Path]) -> Iterator[tuple[int, Path, list[Micro]]]:
    """Iteration, tar and micro-batches of one rank, one after the other."""
    for file in files:
        last = None
        try:
            with tarfile.open(file, "r:") as tar:
                for member in tar:
                    found = _MEMBER.fullmatch(member.name)
                    if found and member.isreg():
                        opened = tar.extractfile(member)
                        assert opened is not None
                        last = int(found[1])
                        yield last, file, _payload(opened.read(), f"{file} member {member.name}")
        except (OSError, tarfile.TarError) as error:
            raise CacheError(f"{file} is damaged: {error}") from error
        if last != int(_NAME.fullmatch(file.name)[3]):  # type: ignore[index]
            raise CacheError(f"{file} is damaged: by its name it ends with another iteration than {last}")


def _meta(file: Path) -> dict[str, Any]:
    try:
        with tarfile.open(file, "r:") as tar:
            opened = tar.extractfile(META)
            assert opened is not None
            found = json.loads(opened.read())
    except KeyError:
        raise CacheError(f"{file}: has no {META}; it is not a tar of cached logits") from None
    except (OSError, tarfile.TarError, ValueError) as error:
        raise CacheError(f"{file} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise CacheError(f"{file}: {META} holds a {type(found).__name__}")
    return found


def _payload(data: bytes, where: str) -> list[Micro]:
    try:
        raw = pa.CompressedInputStream(pa.BufferReader(data), "zstd").read()
        # Nothing but tensors, lists and dictionaries can come out of it.
        found = torch.load(io.BytesIO(raw), weights_only=True, map_location="cpu")
    except Exception as error:  # torch and its zip reader raise whatever a damaged file leads them to
        raise CacheError(f"{where} is damaged: {tables.short(error)}") from None
    if not isinstance(found, dict) or not all(isinstance(found.get(name), list) for name in _LISTS):
        raise CacheError(f"{where}: needs the lists {', '.join(_LISTS)}")
    lists = [found[name] for name in _LISTS]
    if len(set(map(len, lists))) != 1:
        raise CacheError(f"{where}: {', '.join(_LISTS)} differ in length")
    micros = []
    for values, low, high in zip(*lists):
        tensors = [part for part in (values, low, high) if isinstance(part, torch.Tensor) and part.dim() == 3]
        if len(tensors) != 3 or not values.shape == low.shape == high.shape:
            raise CacheError(
                f"{where}: {', '.join(_LISTS)} must be tensors [positions, sequences, entries] of one shape"
            )
        ids = low.numpy().astype(np.int64) | (high.numpy().astype(np.int64) << 16)
        micros.append((values.float().numpy(), ids))
    return micros


def _joined(parts: list[Micro], where: str) -> Micro:
    """The whole sequences of a micro-batch from those of all context-parallel ranks."""
    if len(parts) == 1:
        return parts[0]
    if len({values.shape[:2] for values, _ in parts}) != 1 or len(parts[0][0]) % 2:
        raise CacheError(f"{where}: context-parallel ranks hold {[v.shape for v, _ in parts]}")
    width = max(values.shape[2] for values, _ in parts)
    halves: list[Any] = [None] * (2 * len(parts))
    for c, (values, ids) in enumerate(parts):
        fill = ((0, 0), (0, 0), (0, width - values.shape[2]))
        padded = np.pad(values, fill, constant_values=-1000.0), np.pad(ids, fill)
        first, second = zip(*(np.split(part, 2) for part in padded))
        halves[c], halves[2 * len(parts) - 1 - c] = first, second
    return np.concatenate([half[0] for half in halves]), np.concatenate([half[1] for half in halves])


def _named(head: tuple[int, Path, list[Micro]] | None) -> str:
    return "no more" if head is None else f"iteration {head[0]}"
