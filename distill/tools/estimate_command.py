"""`estimate`: from a configuration, an existing cache or plain numbers to sizes and hours."""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import TYPE_CHECKING

from distill.config import json_text
from distill.config.errors import ConfigError
from distill.config.paths import home
from distill.config.registry import CODECS
from distill.config.schema import CodecConfig

if TYPE_CHECKING:
    from distill.tools.estimate import Estimate

DEFAULT_ENTROPY = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments; `run` takes what they parse to."""
    add = parser.add_argument
    add("overrides", nargs="*", metavar="KEY=VALUE", help="with --config: overrides of the configuration")
    add("--config", metavar="EXPERIMENT", help="take codec, shapes and tokens from this experiment's teacher")
    add("--config-dir", metavar="DIR", type=home, help="with --config: a folder of your own configuration")
    add("--like", metavar="DIR", type=home, help="bytes per token as in this cache, and its codec and shapes")
    add("--tokens", type=_count, help="tokens that get targets, e.g. 15e12")
    add("--corpus-tokens", type=_count, help="tokens of the corpus, if more (the same)")
    add("--sample-tokens", type=_count, help="tokens of a sample (1024)")
    add("--vocab-size", type=_count, help="ids of the teacher's head (202048)")
    add("--codec", choices=CODECS.names, help="(systematic)")
    add("--draws", type=int, help="of codecs systematic and multinomial (20)")
    add("--tau", type=float, help="of codec threshold (0.05)")
    add("--k", type=int, help="of codec topk (12)")
    add("--shard-samples", type=_count, help="samples of a shard (256)")
    add("--entropy", type=float, help=f"the teacher's mean entropy, nats a token ({DEFAULT_ENTROPY}); not with --like")
    add(
        "--tokens-per-second", type=_count, help="of the teacher with capture, or of a backfill, all processes together"
    )
    add("--json", action="store_true", help="one JSON object, for programs")


def _count(text: str) -> int:
    try:
        value = float(text)
        if not 1 <= value < 2**62 or value != int(value):
            raise ValueError
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up") from None
    return int(value)


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError or CacheError: arguments that do not fit each other, or a cache that cannot be read."""
    from distill.cache.header import CacheHeader
    from distill.tools.estimate import BytesPerToken, estimate, from_cache, from_rows

    if args.config_dir and not args.config:
        raise ConfigError(f"--config-dir is {args.config_dir}; it needs --config")
    if args.overrides and not args.config:
        raise ConfigError(f"{args.overrides[0]!r} is an override; it needs --config")
    if args.like and args.entropy is not None:
        raise ConfigError("--entropy is no option of --like, which knows the bytes")
    plain = {"sample_tokens": 1024, "vocab_size": 202_048, "shard_samples": 256, "tokens": None}
    codec = CodecConfig()
    like: BytesPerToken | None = None
    if args.config:
        codec, found = _configured(args.config, args.overrides, args.config_dir)
        plain |= found
    if args.like:
        from distill.tools.common import caches

        header, like = from_cache(caches(args.like)[0])
        if not args.config:
            codec = header.codec
            plain |= {"sample_tokens": header.sample_tokens, "vocab_size": header.vocab_size}
    plain |= {name: value for name in plain if (value := getattr(args, name)) is not None}
    changes = {name: value for name in ("draws", "tau", "k") if (value := getattr(args, name)) is not None}
    codec = dataclasses.replace(codec, **changes | ({"name": args.codec} if args.codec else {}))
    tokens = plain["tokens"]
    if tokens is None:
        raise ConfigError("--tokens is missing; how many tokens get targets?")
    if not 0.004 <= codec.tau < 1:
        raise ConfigError(f"--tau is {codec.tau}; allowed is 0.004 <= tau < 1")
    shape = CacheHeader(
        vocab_size=plain["vocab_size"] or 0, tokenizer="", corpus="", sample_tokens=plain["sample_tokens"] or 0,
        samples=0, codec=codec, seed=0,
    )  # fmt: skip
    shape.dump()  # refuses what no cache can be
    if like is None:
        entropy = DEFAULT_ENTROPY if args.entropy is None else args.entropy
        most = math.log(shape.vocab_size)
        if not entropy > 0:
            raise ConfigError(f"--entropy is {entropy}; it must be positive (nats)")
        if entropy > most:
            raise ConfigError(f"--entropy is {entropy}; {shape.vocab_size} ids have at most {most:.2f} nats")
        like = from_rows(codec, shape.vocab_size, shape.sample_tokens, entropy)
    elif header.codec != codec or header.vocab_size != shape.vocab_size:
        raise ConfigError(
            f"--like {args.like} has codec {header.codec} and {header.vocab_size} ids; its bytes per token say nothing "
            f"of codec {codec} and {shape.vocab_size} ids"
        )
    corpus = max(args.corpus_tokens or 0, tokens)
    done = estimate(tokens, -(-corpus // shape.sample_tokens), shape, like, plain["shard_samples"] or 1)
    seconds = tokens / args.tokens_per_second if args.tokens_per_second else None
    if args.json:
        print(json_text.dumps(dataclasses.asdict(done) | {"tokens": tokens, "seconds": seconds}))
    else:
        print("\n".join(_lines(done, tokens, shape.sample_tokens, seconds)))
    return 0


def _configured(
    experiment: str, overrides: list[str], config_dir: str | None
) -> tuple[CodecConfig, dict[str, int | None]]:
    from distill.config.load import resolve

    config = resolve([f"experiment={experiment}", "job=teacher", *overrides], config_dir)
    train, width = config.teacher.train, config.data.sample_tokens
    return config.cache.codec, {
        "sample_tokens": width,
        "vocab_size": config.teacher.model.vocab_size,
        "shard_samples": config.cache.shard_samples,
        # With epochs the corpus decides, which is not packed yet.
        "tokens": None if train.steps is None else train.steps * train.batch * width,
    }


def _lines(done: Estimate, tokens: int, sample_tokens: int, seconds: float | None) -> list[str]:
    from distill.tools.show import number, size

    each = done.per_token
    lines = [
        f"{number(tokens)} tokens in {number(done.samples)} samples of {number(sample_tokens)}",
        f"bytes per token: {each.likely:.2f} in records, {each.low:.2f} to {each.high:.2f} (from {each.source})",
        f"size: {size(done.likely)}, {size(done.low)} to {size(done.high)}; with all files "
        f"{done.likely / tokens:.2f} bytes a token",
        f"shards: {number(done.shards)}; ledgers {size(done.ledgers)}; ranks {size(done.ranks)}",
        f"a reader: {size(done.reader_memory)} of memory, {size(done.reader_table)} of temporary disk",
    ]
    if done.shards > 100_000:
        lines.append("so many shards are slow to open: more cache.shard_samples, or compact now and then")
    if seconds is None:
        return [*lines, "time: give --tokens-per-second"]
    return [*lines, f"time: {seconds / 3600:,.1f} hours, writing {size(done.likely / seconds)} a second"]
