"""Codecs by name."""

from __future__ import annotations

from distill.cache.codecs.base import Codec
from distill.cache.codecs.multinomial import Multinomial
from distill.cache.codecs.threshold import Threshold
from distill.cache.codecs.topk import TopK
from distill.cache.header import codec_name
from distill.config.schema import CodecConfig, CodecName

__all__ = ["Codec", "make_codec"]


def make_codec(config: CodecConfig, vocab_size: int) -> Codec:
    """The codec of a configuration.

    Raises:
        CacheError: a name that is not known, or a parameter that cannot be stored.
    """
    name = codec_name(config)
    if name is CodecName.threshold:
        return Threshold(config.tau)
    if name is CodecName.multinomial:
        return Multinomial(config.draws)
    return TopK(config.k, vocab_size)
