"""The cache of soft targets: its format on disk, readers and writers. docs/python.md shows its use.

Names are loaded on first use, so that `CacheHeader` and what reads headers start without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.cache.codecs import Codec, Picks, Selection, make_codec
    from distill.cache.header import CacheHeader, is_created
    from distill.cache.reader import CacheReader, ReadResult
    from distill.cache.tail import is_written
    from distill.cache.targets import Atoms, SoftTargets
    from distill.cache.tokens import token_digests
    from distill.cache.writer import CacheWriter
    from distill.config.schema import CodecConfig

__all__ = [
    "Atoms", "CacheHeader", "CacheReader", "CacheWriter", "Codec", "CodecConfig", "Picks", "ReadResult",
    "Selection", "SoftTargets", "is_created", "is_written", "make_codec", "token_digests",
]  # fmt: skip

_HOMES = {
    "Atoms": "targets",
    "CacheHeader": "header",
    "CacheReader": "reader",
    "CacheWriter": "writer",
    "Codec": "codecs",
    "Picks": "codecs",
    "ReadResult": "reader",
    "Selection": "codecs",
    "SoftTargets": "targets",
    "is_created": "header",
    "is_written": "tail",
    "make_codec": "codecs",
    "token_digests": "tokens",
}


def __getattr__(name: str) -> Any:
    if name == "CodecConfig":
        return import_module("distill.config.schema").CodecConfig
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
