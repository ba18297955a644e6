"""Any `tokenizer.json`, or a byte-level BPE trained on the corpus; the only file that knows `tokenizers`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from distill.config.errors import ConfigError, DataError
from distill.config.files import write_text
from distill.config.paths import home
from distill.config.schema import IMAGE_TOKENS, TokenizerConfig

BYTES = 256
"""Ids that a byte-level alphabet takes before the first merge."""


class ImageIds(NamedTuple):
    """Ids of IMAGE_TOKENS, in their order."""

    start: int
    end: int
    tile_x: int
    tile_y: int
    image: int
    patch: int


class Tokenizer:
    """Text to ids, without padding, truncation or added tokens: bos and eos are put in by whoever packs.

    Special tokens that stand in the text as such become their own ids, as chat corpora need it.

    Args:
        record: the parsed `tokenizer.json`.
        bos, eos: tokens that open and close a document; None: none does.
        name: what messages call it.

    Raises:
        DataError: the record is no tokenizer, or a token is not in it.
    """

    def __init__(self, record: dict[str, Any], bos: str | None, eos: str | None, name: str):
        from tokenizers import Tokenizer as Library

        self._name = name
        self._json = json.dumps(record, sort_keys=True, separators=(",", ":"))
        # A post-processor would trim offsets and may add tokens of its own.
        plain = {**record, "post_processor": None, "padding": None, "truncation": None}
        try:
            self._library = Library.from_str(json.dumps(plain))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{name}: not a tokenizer.json: {error}") from error
        self.digest: str = xxhash.xxh3_128_hexdigest(self._json.encode())
        self.vocab_size: int = max(self._library.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_id = self._special("bos", bos)
        self.eos_id = self._special("eos", eos)

    def _special(self, role: str, token: str | None) -> int | None:
        token_id = None if token is None else self._library.token_to_id(token)
        if token is not None and token_id is None:
            raise DataError(
                f"{self._name}: has no token {token!r} (data.tokenizer.{role}); name one that it has, or null"
            )
        return token_id

    def image_ids(self) -> ImageIds:
        """The ids of the tokens that stand for pictures.

        Raises:
            DataError: names those that the tokenizer lacks.
        """
        found: list[Any] = [self._library.token_to_id(token) for token in IMAGE_TOKENS]
        if missing := [token for token, token_id in zip(IMAGE_TOKENS, found) if token_id is None]:
            raise DataError(f"{self._name}: has no {', '.join(missing)}; a corpus with pictures needs them")
        return ImageIds(*found)

    def encode_batch(
        self, texts: Sequence[str], offsets: bool = True
    ) -> list[tuple[list[int], list[tuple[int, int]] | None]]:
        """Ids of each text and, if wanted (they double the time), the [start, end) characters of each token."""
        if offsets:
            return [(e.ids, e.offsets) for e in self._library.encode_batch(list(texts), add_special_tokens=False)]
        return [(e.ids, None) for e in self._library.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return self._library.decode(list(ids), skip_special_tokens=False)

    def id(self, token: str) -> int | None:
        """The id of a token; None where the tokenizer has no such token."""
        found: int | None = self._library.token_to_id(token)
        return found

    def token(self, token_id: int) -> str | None:
        """What the tokenizer calls an id; None where it has no such id."""
        return self._library.id_to_token(token_id) if token_id >= 0 else None

    def agrees(self, other: Tokenizer) -> bool:
        """Whether both give every text the same ids, as far as their files say: padding and templates aside."""
        deciding = ("model", "added_tokens", "normalizer", "pre_tokenizer")
        mine, theirs = json.loads(self._json), json.loads(other._json)
        return all(mine.get(part) == theirs.get(part) for part in deciding)

    def save(self, path: str | Path) -> None:
        """Writes a complete `tokenizer.json` at one stroke; equal tokenizers have equal bytes."""
        write_text(Path(path), self._json)


def load(config: TokenizerConfig, file: str | Path | None = None) -> Tokenizer:
    """The tokenizer of `file`, or else of `config.file`.

    Raises:
        DataError: no such file, not a `tokenizer.json`, or it lacks the bos or eos that the configuration names.
    """
    path = Path(home(str(file or config.file or "")))
    try:
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"data.tokenizer.file is {path}; cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"data.tokenizer.file is {path}; not a tokenizer.json: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"data.tokenizer.file is {path}; not a tokenizer.json: it holds a {type(record).__name__}")
    return Tokenizer(record, config.bos, config.eos, str(path))


def train(config: TokenizerConfig, texts: Iterable[str], pictures: bool = False) -> Tokenizer:
    """A byte-level BPE over `texts`, never above `config.vocab_size` ids; equal texts give equal bytes.

    bos and eos are its first ids, then IMAGE_TOKENS if it is for `pictures`, then the 256 bytes, then merges: every
    text has an encoding.

    Raises:
        ConfigError: the vocabulary has no room for bytes and special tokens.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    specials = [token for token in (config.bos, config.eos) if token is not None]
    specials += IMAGE_TOKENS if pictures else ()
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
