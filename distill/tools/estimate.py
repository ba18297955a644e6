"""How large a cache becomes, before the first record: from measured bytes per token, or those of an existing cache.

bytes_per_token.json has the bytes of records by codec, parameter, vocabulary and the rows' mean entropy, measured with
the real codec and coder by `make bench ONLY=record_bytes`. No torch.
"""

import argparse
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill.cache.entries import ENTRY, ORIGIN
from distill.cache.header import CacheHeader
from distill.cache.listing import ENTRIES, FENCE, FENCES, KEPT, ORIGINS
from distill.cache.shard_header import WIDTH
from distill.cache.store import Store
from distill.cache.view import View, asked, open_view
from distill.config import json_text
from distill.config.errors import CacheError, ConfigError
from distill.config.paths import home
from distill.config.ranges import out_of_range
from distill.config.registry import CODECS
from distill.config.schema import CodecConfig
from distill.config.units import file_size, grouped
from distill.tools.common import caches

TABLE = Path(__file__).with_name("bytes_per_token.json")

HEADER_BYTES = 1330
"""Of a shard's header, with one origin and one bin of losses."""
FOOTER_BYTES = 60
"""Memory of a reader for each block of fences, and of origin rows, of a listing."""
SPREAD = 1.25
"""The table's rows against caches of trained teachers: within this factor either way (LOG.md)."""
DEFAULT_ENTROPY = 2.0


@dataclass(frozen=True)
class BytesPerToken:
    """Of records, with a range and the number's source."""

    low: float
    likely: float
    high: float
    source: str


@dataclass(frozen=True)
class Estimate:
    """Sizes in bytes."""

    per_token: BytesPerToken
    samples: int
    shards: int
    low: float
    """Size of all files."""
    likely: float
    high: float
    catalog: float
    """Size of one listing of all samples; while listings are merged there are two."""
    ranks: float
    reader_memory: float
    """Of each reader process, beyond the libraries: ranks, a listing's footer and blocks."""


def estimate(tokens: int, header: CacheHeader, per_token: BytesPerToken, shard_samples: int) -> Estimate:
    """The cache that holds `tokens` tokens of a corpus; every one has a target."""
    samples = -(-tokens // header.sample_tokens)
    shards = -(-samples // shard_samples)
    ranks = 4.0 * header.vocab_size
    catalog = samples * (ENTRY.itemsize + FENCE.itemsize / ENTRIES) + shards * float(ORIGIN.itemsize)
    footer = FOOTER_BYTES * (samples / (ENTRIES * FENCES) + shards / ORIGINS)
    fixed = samples * WIDTH + shards * HEADER_BYTES + catalog + ranks
    return Estimate(
        per_token=per_token,
        samples=samples,
        shards=shards,
        low=tokens * per_token.low + fixed,
        likely=tokens * per_token.likely + fixed,
        high=tokens * per_token.high + fixed,
        catalog=catalog,
        ranks=ranks,
        reader_memory=ranks + footer + min(catalog, KEPT * ENTRIES * ENTRY.itemsize),
    )


def from_cache(store: Store, header: CacheHeader) -> BytesPerToken:
    """Bytes per token of an existing cache: its records' mean, and the leanest and the fullest tenth of its shards.

    Raises:
        CacheError: one without records, or damage.
    """
    _, (_, rows) = asked(open_view(store, header), View.origins)
    if not rows["tokens"].any():
        raise CacheError(f"{store.root}: holds no records yet; nothing can be estimated from it")
    starts = np.flatnonzero(rows["number"] == 0)
    tokens = np.add.reduceat(rows["tokens"].astype(np.int64), starts)
    records = rows["bytes"][starts].astype(np.int64) - rows["records_at"][starts]
    each, mean = records[tokens > 0] / tokens[tokens > 0], float(records.sum() / tokens.sum())
    low, high = np.quantile(each, [0.1, 0.9]).tolist()
    source = f"{len(starts)} shards of {store.root}"
    return BytesPerToken(min(low, mean), mean, max(high, mean), source)


def from_table(codec: CodecConfig, vocab_size: int, entropy: float) -> BytesPerToken:
    """Bytes per token of a teacher whose mean entropy is `entropy` nats, between the measured ones.

    Linear in entropy, in the logarithm of the vocabulary, and between logarithms of the codec's parameter and of bytes;
    the last two go on beyond what was measured.
    """
    table = json.loads(TABLE.read_text())
    if codec.name not in table["parameters"]:
        raise ConfigError(f"codec is {codec.name}, which was not measured; name a cache of this codec by --like")
    parameters = np.log(table["parameters"][codec.name])
    (name,) = CODECS[codec.name].parameters
    parameter = math.log(getattr(codec, name))
    sizes = []
    for each in table["vocabularies"]:
        by_parameter = [np.interp(entropy, each["entropy"], row) for row in each[codec.name]]
        sizes.append(math.exp(_line(parameter, parameters, np.log(by_parameter))))
    vocabularies = np.log([each["vocab_size"] for each in table["vocabularies"]])
    likely = _line(math.log(vocab_size), vocabularies, np.array(sizes))
    likely = max(likely, min(sizes) / 2)
    return BytesPerToken(likely / SPREAD, likely, likely * SPREAD, f"measured rows of {entropy:g} nats")


def _line(x: float, xs: np.ndarray, ys: np.ndarray) -> float:
    """y at x on straight lines between points, the first and the last of which go on."""
    i = int(np.clip(np.searchsorted(xs, x), 1, len(xs) - 1))
    return float(ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1]))


# ---------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("overrides", nargs="*", metavar="KEY=VALUE", help="with --config: overrides of the configuration")
    add("--config", metavar="EXPERIMENT", help="take codec, shapes and tokens from this experiment's teacher")
    add("--config-dir", metavar="DIR", type=home, help="with --config: a folder of your own configuration")
    add("--like", metavar="DIR", type=home, help="bytes per token as in this cache, and its codec and shapes")
    add("--tokens", type=_count, help="tokens that get targets, e.g. 15e12")
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


@dataclass(frozen=True)
class _Shapes:
    """What a cache's size depends on, beside its bytes per token."""

    codec: CodecConfig = dataclasses.field(default_factory=CodecConfig)
    sample_tokens: int = 1024
    vocab_size: int = 202_048
    shard_samples: int = 256
    tokens: int | None = None


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError or CacheError: arguments that do not fit each other, or a cache that cannot be read."""
    if args.config_dir and not args.config:
        raise ConfigError(f"--config-dir is {args.config_dir}; it needs --config")
    if args.overrides and not args.config:
        raise ConfigError(f"{args.overrides[0]!r} is an override; it needs --config")
    if args.like and args.entropy is not None:
        raise ConfigError("--entropy is no option of --like, which has its own bytes per token")
    shapes = _configured(args.config, args.overrides, args.config_dir) if args.config else _Shapes()
    like = caches(args.like)[0] if args.like else None
    if like and not args.config:
        there = CacheHeader.load(like)
        shapes = _Shapes(there.codec, there.sample_tokens, there.vocab_size)
    shapes = _with_options(shapes, args)
    if shapes.tokens is None:
        raise ConfigError("--tokens is missing; how many tokens get targets?")
    header = CacheHeader(shapes.vocab_size, "", "", shapes.sample_tokens, samples=0, codec=shapes.codec, seed=0)
    header.dump()  # raises for what no cache can be
    per_token = _per_token(args, header, like)
    done = estimate(shapes.tokens, header, per_token, shapes.shard_samples)
    seconds = shapes.tokens / args.tokens_per_second if args.tokens_per_second else None
    if args.json:
        print(json_text.dumps(dataclasses.asdict(done) | {"tokens": shapes.tokens, "seconds": seconds}))
    else:
        print("\n".join(_lines(done, shapes.tokens, shapes.sample_tokens, seconds)))
    return 0


def _configured(experiment: str, overrides: list[str], config_dir: str | None) -> _Shapes:
    from distill.config.load import resolve

    config = resolve([f"experiment={experiment}", "job=teacher", *overrides], config_dir)
    train, width = config.teacher.train, config.data.sample_tokens
    return _Shapes(
        codec=config.cache.codec,
        sample_tokens=width,
        vocab_size=config.teacher.model.vocab_size,
        shard_samples=config.cache.shard_samples,
        # With epochs the corpus decides, which is not packed yet.
        tokens=None if train.steps is None else train.steps * train.batch * width,
    )


def _with_options(shapes: _Shapes, args: argparse.Namespace) -> _Shapes:
    """What the options change; ConfigError for a parameter that its codec cannot have."""

    def given(*names: str) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(args, name)) is not None}

    codec = dataclasses.replace(shapes.codec, **given("draws", "tau", "k"))
    if args.codec:
        codec = dataclasses.replace(codec, name=args.codec)
    if problems := [f"--{problem}" for problem in out_of_range(codec)]:
        raise ConfigError(*problems)
    options = given("sample_tokens", "vocab_size", "shard_samples", "tokens")
    return dataclasses.replace(shapes, codec=codec, **options)


def _per_token(args: argparse.Namespace, header: CacheHeader, like: Store | None) -> BytesPerToken:
    if like is None:
        entropy = DEFAULT_ENTROPY if args.entropy is None else args.entropy
        most = math.log(header.vocab_size)
        if not entropy > 0:
            raise ConfigError(f"--entropy is {entropy}; it must be positive (nats)")
        if entropy > most:
            raise ConfigError(f"--entropy is {entropy}; {header.vocab_size} ids have at most {most:.2f} nats")
        return from_table(header.codec, header.vocab_size, entropy)
    there = CacheHeader.load(like)
    if there.codec != header.codec or there.vocab_size != header.vocab_size:
        raise ConfigError(
            f"--like {args.like} has codec {there.codec} and {there.vocab_size} ids; its bytes per token do not hold "
            f"for codec {header.codec} and {header.vocab_size} ids"
        )
    return from_cache(like, there)


def _lines(done: Estimate, tokens: int, sample_tokens: int, seconds: float | None) -> list[str]:
    each = done.per_token
    lines = [
        f"{grouped(tokens)} tokens in {grouped(done.samples)} samples of {grouped(sample_tokens)}",
        f"bytes per token: {each.likely:.2f} in records, {each.low:.2f} to {each.high:.2f} (from {each.source})",
        f"size: {file_size(done.likely)}, {file_size(done.low)} to {file_size(done.high)}; with all files "
        f"{done.likely / tokens:.2f} bytes a token",
        f"shards: {grouped(done.shards)}; catalog {file_size(done.catalog)}; ranks {file_size(done.ranks)}",
        f"a reader: {file_size(done.reader_memory)} of memory",
    ]
    if seconds is None:
        return [*lines, "time: give --tokens-per-second"]
    return [*lines, f"time: {seconds / 3600:,.1f} hours, writing {file_size(done.likely / seconds)} a second"]
