"""cache.json: the identity of a cache. No torch."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.cache import differ
from distill.cache.fields import checked
from distill.cache.format import FORMAT, HEADER, MAX_SAMPLE_TOKENS, MAX_VOCAB
from distill.cache.open_store import open_store
from distill.cache.seal import digest, seal, unseal
from distill.cache.store import Store, is_missing
from distill.config.errors import CacheError
from distill.config.registry import CODECS
from distill.config.schema import CodecConfig

_DIGEST = re.compile(r"[0-9a-f]{16}")


def _codec_json(config: CodecConfig) -> dict[str, Any]:
    if problem := CODECS.problem("codec.name", config.name):
        raise CacheError(problem)
    return {"name": config.name} | {name: getattr(config, name) for name in CODECS[config.name].parameters}


class NotReadableHere(CacheError):
    """A cache that may be whole: its format version is another one, or its codec is not registered."""


class NoCache(CacheError):
    """There is no cache.json."""


@dataclass(frozen=True)
class CacheHeader:
    """The identity of a cache. Two headers mean the same cache when `check` finds no difference."""

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
    """Seed of the codec's randomness."""
    stream: dict[str, Any] = field(default_factory=dict)
    """The teacher's planned stream of samples, in JSON of the caller's."""
    ranks: str = ""
    """Digest of the rank table, which `publish.create` fills in; empty: there is none, and an id is its rank."""
    folder: str = field(default="", compare=False)
    """Path or URL that the header was read from, for messages; not stored."""

    @property
    def identity(self) -> str:
        """Digest of cache.json, which every shard of the cache has."""
        return digest(self.dump())

    def json(self) -> dict[str, Any]:
        """The fields of cache.json, in the order of the file."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "folder"}
        return {"format": FORMAT} | fields | {"codec": _codec_json(self.codec)}

    def dump(self) -> bytes:
        """The bytes of cache.json; CacheError for a field that the format cannot hold."""
        if not 2 <= self.vocab_size <= MAX_VOCAB:
            raise CacheError(f"vocab_size is {self.vocab_size}; a cache holds vocabularies of 2 to {MAX_VOCAB} ids")
        for name, most in (("sample_tokens", MAX_SAMPLE_TOKENS), ("samples", 2**48 - 1)):
            if not 0 <= getattr(self, name) <= most:
                raise CacheError(f"{name} is {getattr(self, name)}; allowed is 0 to {most}")
        return seal(self.json(), indent=1)

    @classmethod
    def load(cls, where: Store | str | Path) -> CacheHeader:
        """Loads and verifies cache.json from a store, path or URL.

        Raises:
            CacheError: no such cache, a damaged file, another format version, or a codec that is not registered.
        """
        store = where if isinstance(where, Store) else open_store(where)
        path = store.path(HEADER)
        try:
            data = store.read(HEADER)
            record = unseal(data)
            version = record.pop("format", None)
            if version != FORMAT:
                way_out = f"; codistill-cache compact {store.root} --into NEW makes one" if version == 2 else ""
                raise NotReadableHere(f"{path}: format version is {version!r:.80}; allowed is {FORMAT}{way_out}")
            codec = record["codec"]
            if problem := CODECS.problem("codec.name", codec["name"]):
                way_out = "another one needs the module that adds it (plugins=[MODULE], tools: --plugins MODULE)"
                raise NotReadableHere(f"{path}: {problem:.300}; {way_out}")
            header = checked(cls, record | {"codec": checked(CodecConfig, codec)})
            if header.ranks and not _DIGEST.fullmatch(header.ranks):
                raise ValueError(f"ranks is {header.ranks!r:.80}, not a digest")
            try:
                same = header.dump() == data
            except CacheError as error:
                raise CacheError(f"{path}: {error}") from None
            if not same:  # shards have the digest of these bytes: see `identity`
                raise ValueError("it is not laid out as writers of this version do")
            return dataclasses.replace(header, folder=store.root)
        except CacheError as error:
            if is_missing(error):
                raise NoCache(f"{store.root}: no cache here ({HEADER} is missing)") from None
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CacheError(f"{path} is damaged: {error!s:.300}") from error

    def check(self, **expected: Any) -> None:
        """Compares fields with those that a run needs.

        Raises:
            CacheError: a line for every field that differs, with both values.
        """
        here = json.loads(json.dumps(self.json()))
        if "codec" in expected:
            expected["codec"] = _codec_json(expected["codec"])
        expected = json.loads(json.dumps(expected))  # tuples become lists
        assert expected.keys() <= here.keys(), f"no such fields: {expected.keys() - here.keys()}"
        wrong = list(differ.lines({name: here[name] for name in expected}, expected))
        if wrong:
            raise CacheError("\n".join(f"cache {self.folder or '(new)'} does not fit: {each}" for each in wrong))


def is_created(folder: str | Path) -> bool:
    """Whether there is a cache in this folder, or URL; CacheError when it cannot be read."""
    return open_store(folder).exists(HEADER)
