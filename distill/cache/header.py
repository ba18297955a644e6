"""cache.json: what a cache is about. Starts without torch."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.cache import differ
from distill.cache.fields import check_types
from distill.cache.format import FORMAT, HEADER, MAX_SAMPLE_TOKENS, MAX_VOCAB
from distill.cache.open_store import open_store
from distill.cache.seal import digest, seal, unseal
from distill.cache.store import Store
from distill.config.errors import CacheError
from distill.config.registry import CODECS
from distill.config.schema import CodecConfig

_DIGEST = re.compile(r"[0-9a-f]{16}")


def _codec_json(config: CodecConfig) -> dict[str, Any]:
    if problem := CODECS.problem("codec.name", config.name):
        raise CacheError(problem)
    return {"name": config.name} | {name: getattr(config, name) for name in CODECS[config.name].parameters}


@dataclass(frozen=True)
class CacheHeader:
    """The identity of a cache. Two headers are the same cache when `check` finds no difference."""

    vocab_size: int
    """V of the teacher's head; at most 2**24."""
    tokenizer: str
    """Digest of the tokenizer."""
    corpus: str
    """Digest of the packed corpus."""
    sample_tokens: int
    """Tokens S of a sample."""
    samples: int
    """Samples of the corpus; ids are 0 to samples - 1."""
    codec: CodecConfig
    seed: int
    """Of the codec's randomness."""
    stream: dict[str, Any] = field(default_factory=dict)
    """The teacher's planned stream of samples, as the caller describes it; any JSON."""
    ranks: str = ""
    """Digest of the rank table; filled in by whoever creates the cache."""
    folder: str = field(default="", compare=False)
    """Where it was read from, for messages; not stored."""

    @property
    def identity(self) -> str:
        """Digest that every row of the cache's ledgers names."""
        return digest(self.dump())

    def json(self) -> dict[str, Any]:
        """What is stored, in the order of the file."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "folder"}
        return {"format": FORMAT} | fields | {"codec": _codec_json(self.codec)}

    def dump(self) -> bytes:
        """The bytes of cache.json; CacheError when they do not fit the format."""
        if not 2 <= self.vocab_size <= MAX_VOCAB:
            raise CacheError(f"vocab_size is {self.vocab_size}; a cache holds vocabularies of 2 to {MAX_VOCAB} ids")
        for name, most in (("sample_tokens", MAX_SAMPLE_TOKENS), ("samples", 2**48 - 1)):
            if not 0 <= getattr(self, name) <= most:
                raise CacheError(f"{name} is {getattr(self, name)}; allowed is 0 to {most}")
        return seal(self.json(), indent=1)

    @classmethod
    def load(cls, folder: str | Path) -> CacheHeader:
        """Reads and verifies `folder`/cache.json; CacheError as for `read`."""
        return cls.read(open_store(folder))

    @classmethod
    def read(cls, store: Store) -> CacheHeader:
        """Reads and verifies cache.json.

        Raises:
            CacheError: no such cache, a damaged file, an unknown format version or codec.
        """
        path = store.path(HEADER)
        try:
            data = store.read(HEADER)
            record = unseal(data)
            version = record.pop("format", None)
            if version != FORMAT:
                raise CacheError(f"{path}: format version is {version!r:.80}; allowed is {FORMAT}")
            check_types(record, cls)
            codec = record.pop("codec")
            if problem := CODECS.problem("codec.name", codec["name"]):
                raise CacheError(f"{path}: {problem:.300}")
            check_types(codec, CodecConfig)
            config = CodecConfig(**codec)
            header = cls(**record, codec=config, folder=store.root)
            if not _DIGEST.fullmatch(header.ranks):
                raise ValueError(f"ranks is {header.ranks!r:.80}, not a digest")
            try:
                same = header.dump() == data
            except CacheError as error:
                raise CacheError(f"{path}: {error}") from None
            if not same:  # rows name the digest of these bytes: see `identity`
                raise ValueError("it is not laid out as writers of this version do")
            return header
        except CacheError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise CacheError(f"{store.root}: no cache here ({HEADER} is missing)") from None
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CacheError(f"{path} is damaged: {error!s:.300}") from error

    def check(self, **expected: Any) -> None:
        """Compares fields with what a run needs.

        Raises:
            CacheError: a line for every field that differs, with both values.
        """
        here = json.loads(json.dumps(self.json()))
        if "codec" in expected:
            expected["codec"] = _codec_json(expected["codec"])
        expected = json.loads(json.dumps(expected))  # a tuple of the caller's is a list here
        assert expected.keys() <= here.keys(), f"no such fields: {expected.keys() - here.keys()}"
        wrong = list(differ.lines({name: here[name] for name in expected}, expected))
        if wrong:
            raise CacheError("\n".join(f"cache {self.folder or '(new)'} does not fit: {each}" for each in wrong))


def is_created(folder: str | Path) -> bool:
    """Someone has made a cache in this folder, or URL; CacheError when it cannot be looked at."""
    return open_store(folder).exists(HEADER)
