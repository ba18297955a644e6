"""vLLM's prompt log-probabilities: JSON lines, or the same in Parquet, one request each.

    {"prompt_token_ids": [5, 9, ...], "prompt_logprobs": [null, {"9": {"logprob": -0.2, "rank": 1}, ...}, ...]}

Entry i is about token i, given those before it; the first is null. An entry holds the top k and, if it is not among
them, the prompt's own token as one more. That one is not kept as part of the distribution: a support that depends on
the label would favour it. Its log-probability is kept as the teacher's of the label, which is thereby exact.
A server's response (the same under `choices`) is read too, and so are plain numbers in place of {"logprob": ...}.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill.config.errors import CacheError
from distill.data.json_rows import JsonRows
from distill.tools.imports import parquet_rows as tables
from distill.tools.imports.sequences import NO_TAIL, ForeignSequence, SourceInfo, entries

TOKENS, LOGPROBS = "prompt_token_ids", "prompt_logprobs"
_SERVERS_MINUS_INFINITY = -9999.0
"""JSON has none, so the server writes this."""


class _Pair(NamedTuple):
    """One token of an entry."""

    token: int
    logprob: float
    rank: int | None


class Vllm:
    """Reads `*.jsonl` (also `*.json`, one object a line) and `*.parquet` files.

    k: how many entries were asked for, or fewer; default: as many ranks as every entry of the first request has.
    """

    def __init__(self, paths: list[str | Path], *, k: int | None = None):
        self._files = tables.files_of(paths, "*.jsonl", "*.json", "*.parquet")
        self._k = k or self._asked()
        bias = (
            f"top-{self._k} of log-probabilities over the whole vocabulary; {NO_TAIL}; the prompt's own token beyond "
            "the top is not among them"
        )
        self.info = SourceInfo("vllm", bias, self._k)

    def _asked(self) -> int:
        """As many ranks as every entry of the first request with entries has."""
        for where, request in self._requests():
            positions = [_pairs(entry, where, i) for i, entry in enumerate(request[LOGPROBS]) if entry]
            if positions:
                ranks = set.intersection(*({pair.rank for pair in pairs} for pairs in positions))
                most = min(map(len, positions))
                return max((rank for rank in range(1, most + 1) if rank in ranks), default=most)
        raise CacheError(f"{self._files[0]}: no request has entries in {LOGPROBS}")

    def __iter__(self) -> Iterator[ForeignSequence]:
        return (self._sequence(where, request) for where, request in self._requests())

    def _sequence(self, where: str, request: dict[str, Any]) -> ForeignSequence:
        try:
            tokens = np.array(request[TOKENS], np.int64)
        except (TypeError, ValueError, OverflowError):
            raise CacheError(f"{where}: {TOKENS} is not a list of token ids") from None
        listed = request[LOGPROBS]
        if len(listed) != len(tokens) or tokens.ndim != 1:
            raise CacheError(
                f"{where}: {tokens.size} {TOKENS}, {len(listed)} {LOGPROBS}; there must be one for each token, null "
                "for the first"
            )
        if listed and listed[0]:
            raise CacheError(f"{where}: the first of {LOGPROBS} is not null, but nothing comes before the first token")
        positions = [_pairs(entry or {}, where, i) for i, entry in enumerate(listed)][1:]
        labels = np.full(len(positions), np.nan)
        for i, pairs in enumerate(positions):
            labels[i] = next((pair.logprob for pair in pairs if pair.token == tokens[i + 1]), np.nan)
        counts = np.array([len(pairs) for pairs in positions], np.int64)
        ids = np.array([pair.token for pairs in positions for pair in pairs], np.int64)
        logprobs = np.array([pair.logprob for pairs in positions for pair in pairs], np.float64)
        logprobs[logprobs <= _SERVERS_MINUS_INFINITY] = -np.inf
        return ForeignSequence(where, tokens, entries(counts, ids, logprobs, where, self._k), label_logprobs_P=labels)

    def _requests(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for file in self._files:
            yield from _of_parquet(file) if file.suffix == ".parquet" else _of_lines(file)


def _of_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with file.open("rb") as data:
            rows = JsonRows(data.read)
            for line, record in rows:
                choices = record.get("choices")
                for request in choices if isinstance(choices, list) else [record]:
                    yield f"{file} line {line}", _request(request, f"{file} line {line}")
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{file} line {rows.row}: not JSON: {error}") from None
    except OSError as error:
        raise CacheError(f"{file}: {error.strerror}") from error


def _of_parquet(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    tables.demand(file, {TOKENS: "", LOGPROBS: ""})
    for where, columns in tables.values(file, (TOKENS, LOGPROBS), 4):
        try:
            record = {name: value.as_py() for name, value in columns.items()}
            if isinstance(record[LOGPROBS], str):
                record[LOGPROBS] = json.loads(record[LOGPROBS])
        except tables.DAMAGE as error:
            raise CacheError(f"{where}: cannot be read: {tables.short(error)}") from None
        yield where, _request(record, where)


def _request(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict) or not all(isinstance(record.get(name), list) for name in (TOKENS, LOGPROBS)):
        raise CacheError(f"{where}: a request needs the lists {TOKENS} and {LOGPROBS}")
    return record


def _pairs(entry: Any, where: str, place: int) -> list[_Pair]:
    """Of an object, of Parquet's maps (pairs), or of structs with token_id."""
    try:
        if isinstance(entry, dict):
            # What pyarrow makes of dictionaries is one struct of all keys, empty where a row has none.
            items = [(token, value) for token, value in entry.items() if value is not None]
        else:
            items = [(each["token_id"], each) if isinstance(each, dict) else each for each in entry]
        bare = [(token, value if isinstance(value, dict) else {"logprob": value}) for token, value in items]
        return [_Pair(int(token), float(value["logprob"]), value.get("rank")) for token, value in bare]
    except (TypeError, ValueError, KeyError):
        raise CacheError(
            f'{where}: entry {place} of {LOGPROBS} is not {{"id": {{"logprob": number, "rank": number}}, ...}}'
        ) from None
