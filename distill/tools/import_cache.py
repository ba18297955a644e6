"""The command that imports what other stacks wrote: arguments, source, matching, header, writer.

It loads torch, the tokenizer and pyarrow when it runs.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from distill.config.errors import ConfigError, DataError
from distill.config.paths import home
from distill.config.registry import CODECS, Registry
from distill.config.schema import CodecConfig, TokenizerConfig
from distill.config.terminal import Progress
from distill.config.units import short

if TYPE_CHECKING:
    from distill.cache import CacheHeader
    from distill.data.packed import PackedCorpus
    from distill.data.tokenizer import Tokenizer
    from distill.tools.imports.importer import ImportReport, Match
    from distill.tools.imports.sequences import ForeignSequence, ForeignSource, SourceInfo

READERS: Registry[Callable[..., ForeignSource]] = Registry(
    "format",
    {
        "distillkit": "distill.tools.imports.distillkit:DistillKit",
        "parquet": "distill.tools.imports.plain:PlainParquet",
        "vllm": "distill.tools.imports.vllm:Vllm",
        "megatron": "distill.tools.imports.megatron:Megatron",
    },
)
"""The class that reads each format."""
_OPTIONS = (
    "config", "dense_column", "ids_column", "k", "logits", "lse_column", "shifted", "temperature", "tokens_column",
    "values_column",
)  # fmt: skip
"""Arguments of readers, whose own names for them are without `_column`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    codec, tokenizer = CodecConfig(), TokenizerConfig()
    add = parser.add_argument
    add("dir", type=home, help="folder or URL of the cache; made, or added to where it is the same")
    add("files", nargs="+", type=home, help="files or folders of the other stack")
    add("--from", dest="format", required=True, choices=sorted(READERS.names), help="who wrote them")
    add(
        "--corpus", required=True, metavar="FOLDER", type=home,
        help="the packed corpus, e.g. data/main-0123456789abcdef of a run",
    )  # fmt: skip
    add("--split", default="train", help="its split (%(default)s)")
    add("--tokenizer", required=True, metavar="FILE", type=home, help="its tokenizer.json")
    add("--bos", default=tokenizer.bos, help="token before every document, as it was packed; '' is none (%(default)s)")
    add("--eos", default=tokenizer.eos, help="token after every document; '' is none (%(default)s)")
    add("--their-bos", metavar="TOKEN", help="what the other stack puts before a text, where it is not --bos")
    add(
        "--their-end", metavar="TOKEN", help="what it puts after a text, where it is not --eos: another eos, or padding"
    )
    add("--vocab-size", type=int, required=True, metavar="V", help="ids of the student's head")
    add("--teacher", default=None, help="name of the teacher; default: import:FORMAT")
    add("--step", type=int, default=0, help="training step of the teacher; of two targets the later one counts (0)")
    add("--tokens-seen", type=int, default=0, help="by the teacher (0)")
    add("--seed", type=int, default=0, help="of sampled codecs (0)")
    add("--writer", default="import", help="name of the stream of shards (%(default)s)")
    add("--allow-unmatched", action="store_true", help="pass over sequences that are not in the corpus")
    add(
        "--truncated", type=int, metavar="N", help="longest sequence of the other stack, where it cut texts to N tokens"
    )
    add(
        "--order", metavar="FILE", type=home,
        help="megatron: sample ids in the order of training, .npy or one a line; -1: none",
    )  # fmt: skip
    add("--k", type=int, help="keep so many entries a token, fewer than there are")
    add(
        "--config", metavar="FILE", type=home,
        help="distillkit: compression_config.yaml, where it is not beside the data",
    )  # fmt: skip
    add(
        "--temperature", type=float, metavar="T",
        help="vllm: at which its log-probabilities were processed (logprobs_mode processed_logprobs, or a version that "
        "processes all); 1: they are raw, the teacher's own (1). Files do not show it unless requests are in them; "
        "other temperatures make other targets, which the cache then says",
    )  # fmt: skip
    add("--tokens-column", metavar="NAME", help="parquet: token ids (input_ids)")
    add("--dense-column", metavar="NAME", help="parquet: whole rows of log-probabilities or logits (logprobs, logits)")
    add("--ids-column", metavar="NAME", help="parquet: ids of the top-k (topk_ids)")
    add("--values-column", metavar="NAME", help="parquet: their log-probabilities (topk_logprobs)")
    add("--lse-column", metavar="NAME", help="parquet: log-sum-exps, where the values are logits")
    add("--logits", action="store_true", default=None, help="parquet: the top-k are logits without log-sum-exp")
    add("--shifted", action="store_true", default=None, help="parquet: row j is about token j, not about the next one")
    add("--codec", choices=CODECS.names, default=codec.name, help="of dense rows (%(default)s)")
    add("--draws", type=int, default=codec.draws, help="of codecs systematic and multinomial (%(default)s)")
    add("--tau", type=float, default=codec.tau, help="of codec threshold (%(default)s)")


def run(args: argparse.Namespace) -> int:
    import_files(args)
    return 0


def import_files(args: argparse.Namespace) -> ImportReport:
    """Imports; prints the bias of the format first and the report last.

    Raises:
        ConfigError, DataError, CacheError: arguments that do not fit each other, or files that cannot be read.
    """
    from distill.cache import CacheWriter, make_codec
    from distill.data.packed import PackedCorpus
    from distill.data.tokenizer import load_tokenizer
    from distill.tools.imports.encode import SpanEncoder
    from distill.tools.imports.importer import write

    tokenizer = load_tokenizer(TokenizerConfig(bos=args.bos or None, eos=args.eos or None), args.tokenizer)
    if not tokenizer.vocab_size <= args.vocab_size:
        raise ConfigError(f"--vocab-size is {args.vocab_size}; {args.tokenizer} has {tokenizer.vocab_size} ids")
    if args.step < 0 or args.tokens_seen < 0:
        raise ConfigError(f"--step is {args.step}, --tokens-seen {args.tokens_seen}; both are at least 0")
    source = _source(args)
    corpus = PackedCorpus(Path(args.corpus), args.split, Path(args.corpus).name)
    header = _header(args, source.info, tokenizer, corpus)
    encoder = SpanEncoder(make_codec(header.codec, header.vocab_size), header.vocab_size, header.seed)
    print(f"{source.info.format}: {source.info.bias}")
    match = _match(args, corpus, tokenizer)
    writer = CacheWriter(
        args.dir, header, writer=args.writer, counts_V=corpus.counts_V(args.vocab_size), source="import"
    )
    with writer:
        report = write(
            _watched(source),
            match,
            corpus,
            writer,
            encoder,
            teacher=args.teacher or f"import:{args.format}",
            step=args.step,
            tokens_seen=args.tokens_seen,
            allow_unmatched=args.allow_unmatched,
        )
    print("\n".join(report.lines()))
    return report


def _source(args: argparse.Namespace) -> ForeignSource:
    reader = READERS[args.format]
    takes = inspect.signature(reader).parameters
    given = {name: value for name in _OPTIONS if (value := getattr(args, name)) is not None}
    options = {name.removesuffix("_column"): value for name, value in given.items()}
    for name, option in zip(given, options, strict=True):
        if option not in takes:
            raise ConfigError(f"--{name.replace('_', '-')} is no option of --from {args.format}")
    if args.k is not None and args.k < 1:
        raise ConfigError(f"--k is {args.k}; it is at least 1")
    return reader(args.files, **options)


def _header(args: argparse.Namespace, info: SourceInfo, tokenizer: Tokenizer, corpus: PackedCorpus) -> CacheHeader:
    from distill.cache import CacheHeader
    from distill.data.stream import Stream

    if info.k is None:
        codec = CodecConfig(args.codec, draws=args.draws, tau=args.tau, k=args.k or CodecConfig().k)
    else:
        codec = CodecConfig("topk", k=info.k)
    # A student takes the order of its samples from the cache: any order serves here, so it is one epoch of the corpus.
    name = Path(args.corpus).name.rpartition("-")[0] or Path(args.corpus).name
    stream = Stream({name: len(corpus)}, {name: 1.0}, args.seed).describe()
    stream |= {"planned": len(corpus), "batch": 1}
    return CacheHeader(
        vocab_size=args.vocab_size,
        tokenizer=tokenizer.digest,
        corpus=corpus.digest,
        sample_tokens=corpus.sample_tokens,
        samples=len(corpus),
        codec=codec,
        seed=args.seed,
        stream=stream | {"import": {"from": info.format, "bias": info.bias}},
    )


def _match(args: argparse.Namespace, corpus: PackedCorpus, tokenizer: Tokenizer) -> Match:
    from distill.tools.imports.match import ByOrder, ByTokens, load_order

    if args.format == "megatron":
        if args.order is None:
            raise ConfigError(
                "--order is missing; Megatron-LM's cache holds no tokens, so the sample of each sequence must be "
                "given: a .npy or text file with the sample ids in the order of training"
            )
        return ByOrder(corpus, load_order(Path(args.order)), args.order)
    if args.order is not None:
        raise ConfigError(f"--order is no option of --from {args.format}, whose sequences are found by their tokens")
    frame = []
    for ours, name in ((tokenizer.bos_id, "their_bos"), (tokenizer.eos_id, "their_end")):
        token = getattr(args, name)
        theirs = None if token is None else tokenizer.id(token)
        if token is not None and theirs is None:
            raise DataError(f"--{name.replace('_', '-')} is {token!r}; {args.tokenizer} has no such token")
        frame.append({i for i in (ours, theirs) if i is not None})
    return ByTokens(corpus, frame[0], frame[1], args.truncated)


def _watched(source: ForeignSource) -> Iterator[ForeignSequence]:
    with Progress(lambda rate: f"{short(rate)} sequences", transient=True) as progress:
        for count, sequence in enumerate(source, start=1):
            progress.update("import", count, None, amount=1)
            yield sequence
