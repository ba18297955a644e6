"""Any `tokenizer.json`, or a byte-level BPE trained on the corpus; only this file uses `tokenizers`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import xxhash
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from distill.config.errors import ConfigError, DataError
from distill.config.files import LFS_CURE, is_lfs_pointer, write_text
from distill.config.paths import home
from distill.config.schema import IMAGE_TOKENS, TokenizerConfig

TOKENIZER = "tokenizer.json"
"""The name of the file in a run folder, above a cache and in a Hugging Face folder."""
BYTES = 256
"""Ids that a byte-level alphabet takes before the first merge."""

_UNKNOWN = "\0unencodable\0"
"""The unknown token of a twin: nothing that a text holds as a word."""

Ranges = list[tuple[int, int]]
"""[start, end) characters of a text."""


class EncodedText(NamedTuple):
    ids: list[int]
    ranges: Ranges | None
    """The characters of each token; None: not asked for."""


class ImageIds(NamedTuple):
    """Ids of IMAGE_TOKENS, in their order."""

    start: int
    end: int
    tile_x: int
    tile_y: int
    image: int
    patch: int


class Tokenizer:
    """Text to ids, without padding, truncation or added tokens: packing adds bos and eos.

    Special tokens that a text holds as such become their own ids, which chat corpora need.

    Args:
        record: the parsed `tokenizer.json`.
        bos, eos: tokens that open and close a document, or None.
        name: of the tokenizer in messages.

    Raises:
        DataError: the record is no tokenizer, or a token is not in it.
    """

    def __init__(self, record: dict[str, Any], bos: str | None, eos: str | None, name: str):
        self.name, self._record = name, record
        self._json = json.dumps(record, sort_keys=True, separators=(",", ":"))
        # A post-processor would trim offsets and may add tokens of its own.
        plain = {**record, "post_processor": None, "padding": None, "truncation": None}
        if isinstance(model := record.get("model"), dict) and model.get("dropout") is not None:
            plain["model"] = {**model, "dropout": None}  # equal texts have equal ids
        self._library = _library(plain, f"{name}: not a tokenizer.json")
        self._twin = _Twin.of(plain, self._library, name)
        self.digest: str = xxhash.xxh3_128_hexdigest(self._json.encode())
        self.vocab_size: int = max(self._library.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_id, self.eos_id = self.id(bos), self.id(eos)
        lacking = [
            f"{name}: has no token {token!r} (data.tokenizer.{role}); name one that it has, or null{self._specials()}"
            for role, token, token_id in (("bos", bos, self.bos_id), ("eos", eos, self.eos_id))
            if token is not None and token_id is None
        ]
        if problems := lacking + self._shared_ids():
            raise DataError("\n".join(problems))

    def _shared_ids(self) -> list[str]:
        """Problems of ids that two tokens share.

        The library numbers added tokens by the size of the vocabulary; where that has holes, others have these ids.
        """
        own = self._library.get_vocab(with_added_tokens=False)
        by_id = {token_id: token for token, token_id in own.items()}
        return [
            f"{self.name}: {token_id} is the id of {by_id[token_id]!r} and, as an added token, of {added.content!r}; "
            "number the tokens of its model without holes, or put the added ones among them"
            for token_id, added in self._library.get_added_tokens_decoder().items()
            if token_id in by_id and added.content not in own
        ]

    def _specials(self) -> str:
        names = [repr(t.content) for _, t in sorted(self._library.get_added_tokens_decoder().items()) if t.special]
        return f"; its special tokens: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else ""

    def image_ids(self) -> ImageIds:
        """The ids of the tokens of images.

        Raises:
            DataError: names those that the tokenizer lacks.
        """
        if missing := [token for token in IMAGE_TOKENS if self.id(token) is None]:
            raise DataError(f"{self.name}: has no {', '.join(missing)}; a corpus with images needs them")
        return ImageIds(*(self._library.token_to_id(token) for token in IMAGE_TOKENS))

    def encode_batch(self, texts: Sequence[str], offsets: bool = True) -> list[EncodedText]:
        """Ids of each text and, with `offsets`, which doubles the time, the characters of each token.

        Text without a token is left out where there is no unknown token (see `unencodable`).
        """
        try:
            if self._twin is not None and not self._twin.library_passes_over:
                encoded = [text for text, _ in self._twin.encode_batch(texts)]
                return encoded if offsets else [EncodedText(text.ids, None) for text in encoded]
            encode = self._library.encode_batch if offsets else self._library.encode_batch_fast
            encodings = encode(list(texts), add_special_tokens=False)
            return [EncodedText(e.ids, e.offsets if offsets else None) for e in encodings]
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{self.name}: cannot encode a text: {error}") from error

    def unencodable(self, texts: Sequence[str]) -> list[Ranges]:
        """The [start, end) characters of each text that its ids leave out."""
        return [[] for _ in texts] if self._twin is None else [gaps for _, gaps in self._twin.encode_batch(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return self._library.decode(list(ids), skip_special_tokens=False)

    def id(self, token: str | None) -> int | None:
        """The id of a token; None where the tokenizer has no such token, and for None."""
        return None if token is None else self._library.token_to_id(token)

    def token(self, token_id: int) -> str | None:
        """The token of an id; None where the tokenizer has no such id."""
        return self._library.id_to_token(token_id) if token_id >= 0 else None

    def agrees(self, other: Tokenizer) -> bool:
        """Whether both give every text the same ids by what their files hold, padding and templates aside."""
        return self._same(other, "model", "added_tokens", "normalizer", "pre_tokenizer")

    def extends(self, other: Tokenizer) -> bool:
        """Whether every id of the other means the same here; this one may have more."""
        # More merges change the ids of a text; the digests of samples show that.
        models = ({k: v for k, v in t._record["model"].items() if k not in ("vocab", "merges")} for t in (self, other))
        ids, more = (t._library.get_vocab(with_added_tokens=True) for t in (other, self))
        same = self._same(other, "normalizer", "pre_tokenizer", "decoder") and next(models) == next(models)
        return bool(same and ids.items() <= more.items())

    def _same(self, other: Tokenizer, *parts: str) -> bool:
        return all(self._record.get(part) == other._record.get(part) for part in parts)

    def save(self, path: str | Path) -> None:
        """Writes a `tokenizer.json` as a whole; equal tokenizers have equal bytes."""
        write_text(Path(path), self._json)


class _Twin:
    """Finds the text for which a tokenizer without an unknown token has no token.

    On such text the library raises an error (word-level, WordPiece, unigram) or passes over it in silence (BPE). The
    twin has the tokenizer's tokens and an unknown one, which shows where that text is.

    Attributes:
        library_passes_over: whether the library itself encodes the rest of a text with gaps; its ids then count.
    """

    def __init__(self, library: Any, original_ids: dict[int | None, int], library_passes_over: bool):
        self._library, self._original_ids, self.library_passes_over = library, original_ids, library_passes_over
        self._unknown = library.token_to_id(_UNKNOWN)

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
        twin = _library({**record, "model": filled}, f"{name}: has no unknown token, and cannot be given one")
        return cls(twin, {twin.token_to_id(token): token_id for token, token_id in added.items()}, passes_over)

    def encode_batch(self, texts: Sequence[str]) -> list[tuple[EncodedText, Ranges]]:
        """Ids and characters of all tokens but the unknown one, and the characters of that one."""
        encoded = []
        for e in self._library.encode_batch(list(texts), add_special_tokens=False):
            known = [(i, pair) for i, pair in zip(e.ids, e.offsets) if i != self._unknown]
            ids = [self._original_ids.get(i, i) for i, _ in known]
            gaps = [pair for i, pair in zip(e.ids, e.offsets) if i == self._unknown]
            encoded.append((EncodedText(ids, [pair for _, pair in known]), gaps))
        return encoded


def _library(record: dict[str, Any], problem: str) -> Any:
    try:
        return Library.from_str(json.dumps(record))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{problem}: {error}") from error


def _has_all_bytes(record: dict[str, Any]) -> bool:
    """Whether a BPE has a token for every byte, and falls back on it."""
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


def load_tokenizer(config: TokenizerConfig, file: str | Path | None = None) -> Tokenizer:
    """The tokenizer of `file`, or else of `config.file`.

    Raises:
        DataError: no such file, not a `tokenizer.json`, or it lacks the bos or eos that the configuration names.
    """
    path = Path(home(str(file or config.file or "")))
    try:
        if is_lfs_pointer(path):
            raise DataError(f"data.tokenizer.file is {path}; {LFS_CURE}")
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"data.tokenizer.file is {path}; cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"data.tokenizer.file is {path}; not a tokenizer.json: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"data.tokenizer.file is {path}; not a tokenizer.json: it holds a {type(record).__name__}")
    return Tokenizer(record, config.bos, config.eos, str(path))


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str], images: bool = False) -> Tokenizer:
    """A byte-level BPE over `texts`, never above `config.vocab_size` ids; equal texts give equal bytes.

    bos and eos are its first ids, then IMAGE_TOKENS if it is for `images`, then the 256 bytes, then merges: every
    text has an encoding.

    Raises:
        ConfigError: the vocabulary has no room for bytes and special tokens.
    """
    specials = [token for token in (config.bos, config.eos) if token is not None]
    specials += IMAGE_TOKENS if images else ()
    if config.vocab_size < BYTES + len(specials):
        raise ConfigError(f"data.tokenizer.vocab_size is {config.vocab_size}; at least {BYTES + len(specials)}")
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=2,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    return Tokenizer(json.loads(library.to_str()), config.bos, config.eos, "the trained tokenizer")
