"""Text for which a tokenizer without an unknown token has no token.

On such text the library raises an error (word-level, WordPiece, unigram) or passes over it in silence (BPE). A twin of
the tokenizer that has an unknown token shows where it is.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

from distill.config.errors import DataError

_UNKNOWN = "\0unencodable\0"
"""The twin's unknown token: nothing that a text holds as a word."""

Ranges = list[tuple[int, int]]
"""[start, end) characters of a text."""


class EncodedText(NamedTuple):
    ids: list[int]
    ranges: Ranges | None
    """The characters of each token; None: not asked for."""


class Gaps:
    """The twin of a tokenizer.

    Attributes:
        library_passes_over: whether the library itself encodes the rest of a text with gaps; its ids then count.
    """

    def __init__(self, twin: Any, original_ids: dict[int | None, int], library_passes_over: bool):
        self._twin, self._original_ids, self.library_passes_over = twin, original_ids, library_passes_over
        self._unknown = twin.token_to_id(_UNKNOWN)

    @classmethod
    def of(cls, record: dict[str, Any], library: Any, name: str) -> Self | None:
        """For a parsed `tokenizer.json` and the library's tokenizer of it; None: every text has an encoding.

        Raises:
            DataError: such a tokenizer cannot be given an unknown token.
        """
        model = record["model"]
        vocab = model["vocab"]
        added = {t["content"]: library.token_to_id(t["content"]) for t in record.get("added_tokens") or []}
        if isinstance(vocab, list):  # unigram: pairs of token and score; ids are places
            if model.get("unk_id") is not None:
                return None
            least = min((score for _, score in vocab), default=0.0)
            filled = {**model, "vocab": [*vocab, [_UNKNOWN, least - 100]], "unk_id": len(vocab)}
        else:
            if model.get("unk_token") in vocab or _has_all_bytes(record):
                return None
            ids = vocab | added  # the library would number added tokens by the size of the vocabulary
            filled = {**model, "vocab": {**ids, _UNKNOWN: max(ids.values(), default=-1) + 1}, "unk_token": _UNKNOWN}
        passes_over = "merges" in model and model.get("unk_token") is None
        from tokenizers import Tokenizer as Library

        try:
            twin = Library.from_str(json.dumps({**record, "model": filled}))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{name}: has no unknown token, and cannot be given one: {error}") from error
        return cls(twin, {twin.token_to_id(token): token_id for token, token_id in added.items()}, passes_over)

    def encode_batch(self, texts: Sequence[str]) -> list[EncodedText]:
        """Ids and characters of all tokens but the unknown one."""
        encoded = []
        for e in self._twin.encode_batch(list(texts), add_special_tokens=False):
            tokens = [(i, pair) for i, pair in zip(e.ids, e.offsets) if i != self._unknown]
            ids = [self._original_ids.get(i, i) for i, _ in tokens]
            encoded.append(EncodedText(ids, [pair for _, pair in tokens]))
        return encoded

    def find(self, texts: Sequence[str]) -> list[Ranges]:
        """The characters of the unknown token."""
        return [
            [pair for i, pair in zip(e.ids, e.offsets) if i == self._unknown]
            for e in self._twin.encode_batch(list(texts), add_special_tokens=False)
        ]


def _has_all_bytes(record: dict[str, Any]) -> bool:
    """Whether a BPE has a token for every byte, and falls back on it."""
    from tokenizers import pre_tokenizers

    model = record["model"]
    if "merges" not in model:
        return False
    if model.get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
    parts = [part for key in ("normalizer", "pre_tokenizer") if (part := record.get(key))]
    while parts:
        part = parts.pop()
        if part.get("type") == "ByteLevel":
            return model["vocab"].keys() >= set(pre_tokenizers.ByteLevel.alphabet())
        parts += part.get("pretokenizers") or part.get("normalizers") or []
    return False
