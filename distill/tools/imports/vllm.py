"""vLLM's prompt log-probabilities: JSON lines, or the same in Parquet, one request each.

    {"prompt_token_ids": [5, 9, ...], "prompt_logprobs": [null, {"9": {"logprob": -0.2, "rank": 1}, ...}, ...]}

Entry i is about token i, given those before it; the first is null. An entry holds the top k and, if it is not among
them, the prompt's own token as one more. That one is not kept as part of the distribution: a support that depends on
the label would favour it. Its log-probability is kept as the teacher's of the label, which is thereby exact.
A server's response (the same under `choices`) is read too, and so are plain numbers in place of {"logprob": ...}.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from distill.config.errors import CacheError
from distill.tools.imports import parquet_rows as tables
from distill.tools.imports.sequences import ForeignSequence, SourceInfo, entries, largest

TOKENS, LOGPROBS = "prompt_token_ids", "prompt_logprobs"
_SERVERS_MINUS_INFINITY = -9999.0
"""JSON has none, so the server writes this."""


class Vllm:
    """Reads `*.jsonl` (also `*.json`, one object a line) and `*.parquet` files.

    k: how many entries were asked for, or fewer; default: as many ranks as every entry of the first request has.
    """

    def __init__(self, paths: list[str | Path], *, k: int | None = None):
        self._files = [file for path in paths for file in _files(Path(path))]
        self._k = k or self._asked()
        self.info = SourceInfo(
            format="vllm",
            bias=f"top-{self._k} of log-probabilities over the whole vocabulary; the mass of the rest is known, its "
            "ids are not, so the tail is not taught; the prompt's own token beyond the top is not among them",
            k=self._k,
        )

    def _asked(self) -> int:
        for where, request in self._requests():
            found = [_pairs(entry, where, i) for i, entry in enumerate(request[LOGPROBS]) if entry]
            if not found:
                continue
            ranks = [{rank for _, _, rank in pairs if rank is not None} for pairs in found]
            most = min(map(len, found))
            return max((r for r in range(1, most + 1) if all(r in each for each in ranks)), default=most)
        raise CacheError(f"{self._files[0]}: no request has entries in {LOGPROBS}")

    def __iter__(self) -> Iterator[ForeignSequence]:
        for where, request in self._requests():
            yield self._sequence(where, request)

    def _sequence(self, where: str, request: dict[str, Any]) -> ForeignSequence:
        try:
            tokens = np.array(request[TOKENS], np.int64)
        except (TypeError, ValueError, OverflowError):
            raise CacheError(f"{where}: {TOKENS} is not a list of token ids") from None
        found = request[LOGPROBS]
        if len(found) != len(tokens) or tokens.ndim != 1:
            raise CacheError(
                f"{where}: {tokens.size} {TOKENS}, {len(found)} {LOGPROBS}; there must be one for each token, null for "
                "the first"
            )
        if len(found) and found[0]:
            raise CacheError(f"{where}: the first of {LOGPROBS} is not null, but nothing comes before the first token")
        pairs = [_pairs(entry or {}, where, i) for i, entry in enumerate(found)][1:]
        labels = np.full(len(pairs), np.nan)
        for i, position in enumerate(pairs):
            labels[i] = next((logprob for token, logprob, _ in position if token == tokens[i + 1]), np.nan)
        counts = np.array([len(position) for position in pairs], np.int64)
        every = [pair for position in pairs for pair in position]
        ids = np.array([pair[0] for pair in every], np.int64)
        logprobs = np.array([pair[1] for pair in every], np.float64)
        logprobs[logprobs <= _SERVERS_MINUS_INFINITY] = -np.inf
        return ForeignSequence(
            where, tokens, largest(entries(counts, ids, logprobs, where), self._k), label_logprobs_P=labels
        )

    def _requests(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for file in self._files:
            yield from _of_parquet(file) if file.suffix == ".parquet" else _of_lines(file)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return tables.files_of([path], "*")
    for pattern in ("*.jsonl", "*.json", "*.parquet"):
        if any(path.glob(pattern)):
            return tables.files_of([path], pattern)
    raise CacheError(f"{path}: no *.jsonl, *.json or *.parquet in this folder")


def _of_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"{file} line {number}"
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise CacheError(f"{where}: not JSON: {error}") from None
                choices = record.get("choices") if isinstance(record, dict) else None
                for request in choices if isinstance(choices, list) else [record]:
                    yield where, _request(request, where)
    except OSError as error:
        raise CacheError(f"{file}: {error.strerror}") from error


def _of_parquet(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    names = tables.columns_of(file)
    if missing := [name for name in (TOKENS, LOGPROBS) if name not in names]:
        raise CacheError(f"{file}: has no column {', '.join(missing)}; its columns are {', '.join(names)}")
    number = 0
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as table:
            for batch in table.iter_batches(batch_size=4, columns=[TOKENS, LOGPROBS]):
                for record in batch.to_pylist():
                    where = f"{file} row {number}"
                    if isinstance(record[LOGPROBS], str):
                        try:
                            record[LOGPROBS] = json.loads(record[LOGPROBS])
                        except ValueError as error:
                            raise CacheError(f"{where}: {LOGPROBS} is not JSON: {error}") from None
                    yield where, _request(record, where)
                    number += 1
    except tables.DAMAGE as error:
        raise CacheError(f"{file} is damaged near row {number}: {tables.short(error)}") from error


def _request(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict) or not all(isinstance(record.get(name), list) for name in (TOKENS, LOGPROBS)):
        raise CacheError(f"{where}: a request needs the lists {TOKENS} and {LOGPROBS}")
    return record


def _pairs(entry: Any, where: str, place: int) -> list[tuple[int, float, int | None]]:
    """Token, log-probability and rank of each; of an object, of Parquet's maps (pairs), or of structs with token_id."""
    try:
        if isinstance(entry, dict):
            # What pyarrow makes of dictionaries is one struct of all keys, empty where a row has none.
            items = [(token, value) for token, value in entry.items() if value is not None]
        else:
            items = [(each["token_id"], each) if isinstance(each, dict) else each for each in entry]
        bare = [each if isinstance(each, dict) else {"logprob": each} for _, each in items]
        return [(int(token), float(each["logprob"]), each.get("rank")) for (token, _), each in zip(items, bare)]
    except (TypeError, ValueError, KeyError):
        raise CacheError(
            f'{where}: entry {place} of {LOGPROBS} is not {{"id": {{"logprob": number, "rank": number}}, ...}}'
        ) from None
