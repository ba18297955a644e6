"""vLLM's prompt log-probabilities: JSON lines, or the same in Parquet, one request each.

    {"prompt_token_ids": [5, 9, ...], "prompt_logprobs": [null, {"9": {"logprob": -0.2, "rank": 1}, ...}, ...]}

Entry i is about token i, given those before it; the first is null. An entry holds the top k and, if it is not among
them, the prompt's own token as one more. That one is not kept as part of the distribution: a support that depends on
the label would favour it. Its log-probability is kept as the teacher's of the label, which is thereby exact.
A server's response (the same under `choices`) is read too, and so are plain numbers in place of {"logprob": ...}.

vLLM gives raw log-probabilities, or with `logprobs_mode` processed_logprobs those after penalties, temperature and
top-p, which are other targets. Its outputs do not say which. Where a file has requests beside them, their temperature
and mode are compared with what the user has said.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill.config.errors import CacheError, ConfigError
from distill.data.json_rows import JsonRows
from distill.tools.imports import parquet_rows as tables
from distill.tools.imports.sequences import NO_TAIL, ForeignSequence, SourceInfo, entries

TOKENS, LOGPROBS = "prompt_token_ids", "prompt_logprobs"
SETTINGS = ("logprobs_mode", "temperature")
"""Of a request, which a user may have written beside its outputs."""
RAW, PROCESSED = "raw_logprobs", "processed_logprobs"
_BESIDE = (*SETTINGS, "sampling_params")
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
    temperature: at which the log-probabilities were processed; 1: they are raw. None: raw, unless a request shows
    something else, which is a CacheError.
    """

    def __init__(self, paths: list[str | Path], *, k: int | None = None, temperature: float | None = None):
        if temperature is not None and not 0 < temperature < math.inf:
            raise ConfigError(f"--temperature is {temperature}; it is greater than 0")
        self._files = tables.files_of(paths, "*.jsonl", "*.json", "*.parquet")
        self._temperature = temperature
        self._k = k or self._asked()
        bias = (
            f"top-{self._k} of log-probabilities over the whole vocabulary; {NO_TAIL}; the prompt's own token beyond "
            "the top is not among them"
        )
        mode = next((_setting(request, "logprobs_mode") for _, request in self._requests()), None)
        if mode == PROCESSED or temperature not in (None, 1.0):
            bias += (
                f"; processed at temperature {temperature or 1:g}, so these are other targets than the teacher's own "
                "distribution at temperature 1"
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
        self._check_settings(where, request)
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

    def _check_settings(self, where: str, request: dict[str, Any]) -> None:
        """Raises CacheError where a request shows that its values are not what they are taken for."""
        mode, temperature = (_setting(request, name) for name in SETTINGS)
        if mode not in (None, RAW, PROCESSED):
            raise CacheError(f"{where}: logprobs_mode is {mode!r:.80}; its values are no log-probabilities")
        applied = 1.0 if mode == RAW or temperature in (None, 0) else temperature  # 0 is greedy: nothing is scaled
        given = self._temperature
        if given is None and (mode == PROCESSED or applied != 1):
            raise CacheError(
                f"{where}: {f'logprobs_mode is {mode}, ' if mode else ''}temperature is {applied!r:.80}, so its values "
                f"may be other targets than the teacher's own distribution: --temperature {applied!r:.80} takes them "
                "as such, --temperature 1 says that they are raw"
            )
        if given is not None and given != applied and (mode or (temperature is not None and given != 1)):
            raise CacheError(f"{where}: its temperature is {applied!r:.80}; --temperature is {given:g}")

    def _requests(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for file in self._files:
            yield from _of_parquet(file) if file.suffix == ".parquet" else _of_lines(file)


def _setting(request: dict[str, Any], name: str) -> Any:
    """A setting of a request, where the file has it: beside the outputs, or among its sampling parameters."""
    for part in (request, request.get("sampling_params")):
        if isinstance(part, dict) and part.get(name) is not None:
            return part[name]
    return None


def _of_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with file.open("rb") as data:
            rows = JsonRows(data.read)
            for line, record in rows:
                choices = record.get("choices")
                beside = {name: record[name] for name in _BESIDE if name in record}
                for request in choices if isinstance(choices, list) else [record]:
                    yield f"{file} line {line}", beside | _request(request, f"{file} line {line}")
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{file} line {rows.row}: not JSON: {error}") from None
    except OSError as error:
        raise CacheError(f"{file}: {error.strerror}") from error


def _of_parquet(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    tables.demand(file, {TOKENS: "", LOGPROBS: ""})
    beside = [name for name in _BESIDE if name in tables.columns_of(file)]
    for where, columns in tables.values(file, (TOKENS, LOGPROBS, *beside), 4):
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
