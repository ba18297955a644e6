"""DistillKit's compressed Parquet (version 2): top-k ids bit by bit, log-probabilities exact, fitted and quantized.

Per token two strings of bytes. `bytepacked_indices`: k ids of ceil(log2 d) bits each, most significant bit first, one
after the other. `compressed_logprobs`: log-probabilities in falling order, or (delta_encoding) the first one and then
differences, as

    exact_k numbers of exact_dtype, then
    one coefficient of term_dtype for each polynomial term; the rest is their sum over t = 0, 1, ... (normalize_t: t
    from 0 to 1), a term being t**i, sqrt(t) or exp(t); then
    for each of residual_bins, a scale of scale_dtype and num_elements numbers of element_bits bits, padded to whole
    bytes: what the next values differ from the fit, in units of the scale (from -2**(bits - 1); one bit: -1 or 1).

Numbers are little-endian. None of it describes itself: the options are in `compression_config.yaml` beside the data.
What can be checked is: the number of bytes of every token must be that of the options, and ids must be below d and
differ from each other, which those of a wrong d seldom do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from distill.config.errors import CacheError
from distill.tools.imports import parquet_rows as tables
from distill.tools.imports.sequences import NO_TAIL, ForeignSequence, SourceInfo, entries

CONFIG = "compression_config.yaml"
COLUMNS = {
    "input_ids": "list of integers",
    "compressed_logprobs": "list of lists of integers",
    "bytepacked_indices": "list of lists of integers",
}
_DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}
_LEGACY = {"polynomial_degree", "invert_polynomial", "with_sqrt_term", "vocab_size"}
_BIN_NUMBERS = ("element_bits", "num_elements")
_MAX_BITS = 63
"""Of a residual; the format allows 64, whose writer overflows."""


@dataclass(frozen=True)
class ResidualBin:
    """Quantized residuals of `num_elements` values after those of the bin before."""

    scale_dtype: str
    element_bits: int
    num_elements: int

    @property
    def bytes(self) -> int:
        return _DTYPES[self.scale_dtype].itemsize + (self.element_bits * self.num_elements + 7) // 8


@dataclass(frozen=True)
class CompressionConfig:
    """The options of compression that decide what bytes mean; names are the file's."""

    d: int
    k: int
    exact_k: int
    exact_dtype: str = "float32"
    polynomial_terms: list[int | str] = field(default_factory=list)
    term_dtype: str = "float32"
    residual_bins: list[ResidualBin] = field(default_factory=list)
    delta_encoding: bool = True
    normalize_t: bool = False

    @classmethod
    def load(cls, path: Path) -> CompressionConfig:
        """Raises CacheError: names the file, the option, its value, and what can be read."""
        try:
            record = yaml.safe_load(path.read_text())
        except OSError as error:
            raise CacheError(f"{path}: {error.strerror}; without it the packing of the data is unknown") from error
        except (yaml.YAMLError, ValueError) as error:
            raise CacheError(f"{path}: not YAML: {tables.short(error)}") from error
        if not isinstance(record, dict):
            raise CacheError(f"{path}: holds a {type(record).__name__}, not options of compression")
        if legacy := sorted(_LEGACY & record.keys()):
            raise CacheError(
                f"{path}: {legacy[0]} is an option of the legacy format, which keeps centered logits without their sum "
                "over the vocabulary; only the format with compressed_logprobs can be read"
            )
        record.pop("error_diffusion", None)  # of the writer alone
        options = {each.name for each in fields(cls)}
        if unknown := sorted(map(str, record.keys() - options)):
            raise CacheError(f"{path}: {unknown[0]} is no option; options are {', '.join(sorted(options))}")
        try:
            bins = [ResidualBin(**each) for each in record.get("residual_bins") or []]
            terms = record.get("polynomial_terms") or []
            config = cls(**record | {"residual_bins": bins, "polynomial_terms": terms})
        except TypeError as error:
            raise CacheError(f"{path}: {error}") from error
        for problem in config._problems():
            raise CacheError(f"{path}: {problem}")
        return config

    def _problems(self) -> Iterator[str]:
        numbers = [("d", self.d, 2), ("k", self.k, 1), ("exact_k", self.exact_k, 0)]
        dtypes = [("exact_dtype", self.exact_dtype), ("term_dtype", self.term_dtype)]
        for i, each in enumerate(self.residual_bins):
            numbers += [(f"residual_bins[{i}].{name}", getattr(each, name), 1) for name in _BIN_NUMBERS]
            dtypes.append((f"residual_bins[{i}].scale_dtype", each.scale_dtype))
        for name, number, least in numbers:
            if type(number) is not int or number < least:
                yield f"{name} is {number!r}; it must be a whole number, at least {least}"
        for each in self.residual_bins:
            if each.element_bits > _MAX_BITS:
                yield f"element_bits is {each.element_bits}; up to {_MAX_BITS} can be read"
        for name, dtype in dtypes:
            if dtype not in _DTYPES:
                yield f"{name} is {dtype!r}; allowed are {', '.join(_DTYPES)}"
        for term in self.polynomial_terms:
            if type(term) is not int and term not in ("sqrt", "exp"):
                yield f"polynomial_terms has {term!r}; allowed are whole numbers, sqrt and exp"
        fitted, quantized = self.k - self.exact_k, sum(each.num_elements for each in self.residual_bins)
        if fitted < 0 or quantized > fitted:
            yield f"exact_k is {self.exact_k}, residual_bins hold {quantized} more; k is {self.k}"
        if fitted and not self.polynomial_terms and not self.residual_bins:
            yield f"exact_k is {self.exact_k} of k = {self.k}, and nothing describes the others"

    @property
    def id_bits(self) -> int:
        """As the writer counts them: with a logarithm in float32."""
        return int(np.ceil(np.log2(np.float32(self.d))))

    @property
    def id_bytes(self) -> int:
        return (self.k * self.id_bits + 7) // 8

    @property
    def value_bytes(self) -> int:
        exact = self.exact_k * _DTYPES[self.exact_dtype].itemsize
        fit = len(self.polynomial_terms) * _DTYPES[self.term_dtype].itemsize
        return exact + fit + sum(each.bytes for each in self.residual_bins)


class DistillKit:
    """Reads `data_<n>.parquet` files; a packed row (column attention_mask numbers its texts) is several sequences."""

    def __init__(self, paths: list[str | Path], *, config: str | Path | None = None, k: int | None = None):
        """config: the options; default: `compression_config.yaml` beside the first file. k: keep fewer."""
        files = tables.files_of(paths, "*.parquet")
        self._path = Path(config) if config else files[0].parent / CONFIG
        self._config = CompressionConfig.load(self._path)
        self._k = min(k or self._config.k, self._config.k)
        self._tables: list[tuple[Path, dict[str, str]]] = []
        for file in files:
            if "packed_indices" in (names := tables.columns_of(file)):
                raise CacheError(
                    f"{file}: column packed_indices is of the legacy format; only compressed_logprobs and "
                    "bytepacked_indices can be read"
                )
            columns = COLUMNS | ({"attention_mask": "list of integers"} if "attention_mask" in names else {})
            tables.demand(file, columns)
            self._tables.append((file, columns))
        c = self._config
        lossy = f"; of them the first {c.exact_k} exact ({c.exact_dtype}), the others fitted" if c.exact_k < c.k else ""
        bias = f"top-{self._k} of log-probabilities over the whole vocabulary{lossy}; {NO_TAIL}"
        self.info = SourceInfo("distillkit", bias, self._k)

    def __iter__(self) -> Iterator[ForeignSequence]:
        for file, columns in self._tables:
            for row in tables.rows(file, list(columns)):
                yield from self._sequences(row)

    def _sequences(self, row: tables.ParquetRow) -> Iterator[ForeignSequence]:
        tokens = tables.flat(row.columns["input_ids"]).astype(np.int64)
        values, ids = row.columns["compressed_logprobs"], row.columns["bytepacked_indices"]
        positions = len(values)
        if len(ids) != positions or not len(tokens) - 1 <= positions <= len(tokens):
            raise CacheError(
                f"{row.where}: {len(tokens)} input_ids, {positions} compressed_logprobs, {len(ids)} "
                "bytepacked_indices; there must be as many of the latter as tokens, or one less"
            )
        logprobs_PK = self.logprobs(self._bytes(row, "compressed_logprobs", self._config.value_bytes))
        packed = self._bytes(row, "bytepacked_indices", self._config.id_bytes)
        ids_PK = unpack(packed, self._config.id_bits, self._config.k).astype(np.int64)
        wrong = (ids_PK >= self._config.d) & (logprobs_PK > -np.inf)
        if wrong.any():
            at = int(np.flatnonzero(wrong.any(1))[0])
            raise CacheError(
                f"{row.where}, position {at}: id {ids_PK[at].max()}; d is {self._config.d} in {self._path}: is that "
                "the one of the capture?"
            )
        for start, stop in self._texts(row, len(tokens)):
            last = min(stop, positions)
            where = row.where if (start, stop) == (0, len(tokens)) else f"{row.where} tokens {start} to {stop - 1}"
            counts = np.full(last - start, self._config.k)
            kept = entries(counts, ids_PK[start:last].ravel(), logprobs_PK[start:last].ravel(), where, self._k)
            yield ForeignSequence(where, tokens[start:stop], kept)

    @staticmethod
    def _texts(row: tables.ParquetRow, tokens: int) -> list[tuple[int, int]]:
        """Where the texts of a row start and stop; padding (0) is none of them."""
        if "attention_mask" not in row.columns:
            return [(0, tokens)] if tokens else []
        mask = tables.flat(row.columns["attention_mask"])
        if len(mask) != tokens:
            raise CacheError(f"{row.where}: {tokens} input_ids, {len(mask)} in attention_mask")
        borders = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), tokens]
        return [(a, b) for a, b in pairwise(borders) if a < b and mask[a]]

    def _bytes(self, row: tables.ParquetRow, name: str, width: int) -> NDArray[np.uint8]:
        sizes = tables.lengths(row.columns[name])
        if (wrong := np.flatnonzero(sizes != width)).size:
            raise CacheError(
                f"{row.where}, position {wrong[0]}: {sizes[wrong[0]]} bytes of {name}; by the options in {self._path} "
                f"there are {width}"
            )
        return tables.flat(row.columns[name]).astype(np.uint8).reshape(len(sizes), width)

    def logprobs(self, data_PM: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Log-probabilities float64 [P, k] of packed ones."""
        c, place = self._config, 0

        def take(dtype: str, count: int) -> torch.Tensor:
            nonlocal place
            kind = _DTYPES[dtype]
            part = data_PM[:, place : place + count * kind.itemsize].copy()
            place += count * kind.itemsize
            return torch.from_numpy(part).view(kind) if part.size else torch.empty(len(part), count, dtype=kind)

        exact_PK = take(c.exact_dtype, c.exact_k).double()
        fitted = c.k - c.exact_k
        rest_PK = torch.zeros(len(data_PM), fitted, dtype=torch.float64)
        if c.polynomial_terms:
            # In the coefficients' own precision: what the residuals make up for is the fit as it was rounded.
            coefficients_PC = take(c.term_dtype, len(c.polynomial_terms))
            terms_KC = _terms(c.polynomial_terms, fitted, coefficients_PC.dtype, c.normalize_t)
            rest_PK = (terms_KC * coefficients_PC[:, None, :]).sum(-1).double()
        start = 0
        for each in c.residual_bins:
            scale_P1 = take(each.scale_dtype, 1).double().numpy()
            size = (each.element_bits * each.num_elements + 7) // 8
            numbers = unpack(data_PM[:, place : place + size], each.element_bits, each.num_elements)
            place += size
            if each.element_bits == 1:
                units = numbers.astype(np.float64) * 2 - 1
            else:
                units = (numbers.astype(np.int64) - (1 << (each.element_bits - 1))).astype(np.float64)
            rest_PK[:, start : start + each.num_elements] += torch.from_numpy(units * scale_P1)
            start += each.num_elements
        values: NDArray[np.float64] = torch.cat([exact_PK, rest_PK], dim=1).numpy()
        if c.delta_encoding:
            with np.errstate(invalid="ignore"):
                values = values.cumsum(1)
        # A fit may go above what a probability can be; an exact value that does is refused later.
        np.minimum(values[:, c.exact_k :], 0.0, out=values[:, c.exact_k :])
        return values


def unpack(data_PM: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint64]:
    """uint64 [P, count]: the first `count` numbers of `bits` bits in each row of bytes."""
    ones = np.unpackbits(np.ascontiguousarray(data_PM), axis=1)[:, : bits * count]
    ones = ones.reshape(len(data_PM), count, bits)
    numbers = np.zeros((len(data_PM), count), np.uint64)
    for bit in range(bits):
        numbers = (numbers << np.uint64(1)) | ones[:, :, bit]
    return numbers


def _terms(terms: list[Any], count: int, dtype: torch.dtype, normalize_t: bool) -> torch.Tensor:
    """[count, terms], in `dtype`, as the writer has them."""
    t = torch.linspace(0, 1, count, dtype=dtype) if normalize_t else torch.arange(count, dtype=dtype)
    return torch.stack([t**term if isinstance(term, int) else getattr(torch, term)(t) for term in terms], dim=-1)
