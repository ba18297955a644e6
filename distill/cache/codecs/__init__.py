"""Codecs, made by the name that `distill.config.registry` has them under."""

from distill.cache.codecs.base import Codec, Picks, Selection
from distill.config.errors import CacheError
from distill.config.ranges import out_of_range
from distill.config.registry import CODECS
from distill.config.schema import CodecConfig

__all__ = ["Codec", "Picks", "Selection", "make_codec"]


def make_codec(config: CodecConfig, vocab_size: int) -> Codec:
    """The codec of a configuration.

    Raises:
        CacheError: a name that is not registered, or a parameter out of its range; names all of them.
    """
    problems = list(out_of_range(config))
    if not problems:
        problems = list(CODECS[config.name].problems(config, vocab_size))
    if problems:
        raise CacheError("\n".join(f"codec.{problem}" for problem in problems))
    codec: Codec = CODECS[config.name].make(config, vocab_size)
    return codec
