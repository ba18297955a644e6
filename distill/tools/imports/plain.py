"""Plain Parquet, one sequence a row: tokens, and for each a dense row of the vocabulary or its top-k.

What the values are is not in the file, so it is an option of the reader: log-probabilities over the whole vocabulary,
or logits. Of dense logits nothing is lost. Of top-k logits without their log-sum-exp the mass of the rest is, and the
kept ones are made to sum to 1.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from distill.config.errors import CacheError
from distill.tools.imports import parquet_rows as tables
from distill.tools.imports.sequences import NO_TAIL, ForeignSequence, SourceInfo, entries

DENSE = ("logprobs", "logits")
"""Columns that are looked for where none is named."""


class PlainParquet:
    """Reads Parquet files.

    Args:
        tokens: column of the token ids.
        dense: column of values for all ids, [tokens][V]; default: `logprobs` or `logits`, if there is one.
        ids, values: columns of the top-k instead, [tokens][k each].
        lse: column of log-sum-exps, [tokens], where the top-k values are logits.
        logits: the top-k values are logits, without their log-sum-exp.
        shifted: row j of the values is about token j, not about the one after it; the first is about nothing.
        k: keep fewer.

    Raises:
        CacheError: a column is missing or of another type.
    """

    def __init__(
        self, paths: list[str | Path], *, tokens: str = "input_ids", dense: str | None = None, ids: str = "topk_ids",
        values: str = "topk_logprobs", lse: str | None = None, logits: bool = False, shifted: bool = False,
        k: int | None = None,
    ):  # fmt: skip
        self._files = tables.files_of(paths, "*.parquet")
        there = tables.columns_of(self._files[0])
        if dense is None and ids not in there:
            dense = next((name for name in DENSE if name in there), None)
        self._tokens, self._dense, self._ids, self._values, self._lse = tokens, dense, ids, values, lse
        self._logits, self._shifted = logits and lse is None, shifted
        floats = "list of lists of floating-point numbers"
        self._types = {tokens: "list of integers"}
        self._types |= {dense: floats} if dense else {ids: "list of lists of integers", values: floats}
        if lse and not dense:
            self._types[lse] = "list of floating-point numbers"
        for file in self._files:
            tables.demand(file, self._types)
        if dense:
            self.info = SourceInfo("parquet", "none: whole distributions, put through the cache's codec", None)
            return
        self._k = k or self._most()
        scaled = "logits without their sum over the vocabulary, so the kept ones are scaled to 1: over-confident"
        self.info = SourceInfo("parquet", f"top-{self._k}; {scaled if self._logits else NO_TAIL}", self._k)

    def _most(self) -> int:
        """The largest k of the first row; later rows with more are refused, so that none is cut in silence."""
        first = next(tables.rows(self._files[0], [self._ids], 1), None)
        if first is None:
            raise CacheError(f"{self._files[0]}: has no rows")
        return max(1, int(tables.lengths(first.columns[self._ids]).max(initial=0)))

    def __iter__(self) -> Iterator[ForeignSequence]:
        for file in self._files:
            for row in tables.rows(file, list(self._types), 1 if self._dense else 16):
                tokens = tables.flat(row.columns[self._tokens]).astype(np.int64)
                column = row.columns[self._dense or self._ids]
                if not len(tokens) - 1 <= len(column) <= len(tokens) or (self._shifted and len(column) < len(tokens)):
                    least = "" if self._shifted else ", or one less"
                    raise CacheError(
                        f"{row.where}: {len(tokens)} {self._tokens}, {len(column)} {self._dense or self._ids}; there "
                        f"must be as many of the latter{least}"
                    )
                yield self._sparse(row, tokens) if self._dense is None else self._whole(row, tokens)

    def _whole(self, row: tables.ParquetRow, tokens: np.ndarray) -> ForeignSequence:
        assert self._dense is not None
        column = row.columns[self._dense]
        widths = tables.lengths(column)
        if len(widths) and (widths != widths[-1]).any():
            raise CacheError(f"{row.where}: rows of {self._dense} are {widths.min()} to {widths.max()} wide")
        with np.errstate(over="ignore"):  # reported below
            values_PV = tables.flat(column).astype(np.float32).reshape(len(widths), -1)
        if self._shifted:
            values_PV = values_PV[1:]
        if (bad := np.flatnonzero(~np.isfinite(values_PV.max(1, initial=-np.inf)))).size:
            raise CacheError(f"{row.where}, position {bad[0]}: values of {self._dense} are not finite")
        return ForeignSequence(row.where, tokens, dense_PV=values_PV)

    def _sparse(self, row: tables.ParquetRow, tokens: np.ndarray) -> ForeignSequence:
        counts = tables.lengths(row.columns[self._ids])
        if not np.array_equal(counts, tables.lengths(row.columns[self._values])):
            raise CacheError(f"{row.where}: {self._ids} and {self._values} differ in length")
        ids, values = tables.flat(row.columns[self._ids]), tables.flat(row.columns[self._values]).astype(np.float64)
        if self._lse:
            lse = tables.flat(row.columns[self._lse]).astype(np.float64)
            if len(lse) != len(counts):
                raise CacheError(f"{row.where}: {len(lse)} {self._lse}, {len(counts)} {self._ids}")
            values -= np.repeat(lse, counts)
        if self._shifted:
            ids, values, counts = ids[counts[0] :], values[counts[0] :], counts[1:]
        kept = entries(counts, ids, values, row.where, self._k, logits=self._logits)
        return ForeignSequence(row.where, tokens, kept)
