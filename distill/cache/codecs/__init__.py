"""Codecs by name."""

from __future__ import annotations

from distill.cache.codecs.base import Codec, Selection
from distill.cache.codecs.drawn import Multinomial, Systematic
from distill.cache.codecs.threshold import Threshold
from distill.cache.codecs.topk import TopK
from distill.cache.header import codec_name
from distill.config.schema import CodecConfig, CodecName

__all__ = ["Codec", "Selection", "make_codec"]


def make_codec(config: CodecConfig, vocab_size: int) -> Codec:
    """The codec of a configuration.

    Raises:
        CacheError: a name that is not known, or a parameter that cannot be stored.
    """
    name = codec_name(config)
    match name:
        case CodecName.systematic:
            return Systematic(config.draws)
        case CodecName.threshold:
            return Threshold(config.tau)
        case CodecName.multinomial:
            return Multinomial(config.draws)
        case CodecName.topk:
            return TopK(config.k, vocab_size)
