"""The command that imports what other stacks wrote: arguments, source, matching, header, writer.

It knows both the cache and the packed corpus, so it lives above them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from distill.cache import CacheHeader, CacheWriter, make_codec
from distill.config.errors import ConfigError, DataError
from distill.config.paths import home
from distill.config.registry import CODECS
from distill.config.schema import CodecConfig, TokenizerConfig
from distill.data import tokenizer as tokenizers
from distill.data.packed import PackedCorpus
from distill.data.stream import Stream
from distill.data.tokenizer import Tokenizer
from distill.tools.imports.distillkit import DistillKit
from distill.tools.imports.encode import Encoder
from distill.tools.imports.importer import Match, Report, write
from distill.tools.imports.match import ByOrder, ByTokens, load_order
from distill.tools.imports.megatron import Megatron
from distill.tools.imports.plain import Plain
from distill.tools.imports.sequences import Facts, Sequence, Source
from distill.tools.imports.vllm import Vllm

_READERS: dict[str, Any] = {"distillkit": DistillKit, "parquet": Plain, "vllm": Vllm, "megatron": Megatron}
_OPTIONS = {
    "distillkit": {"config": "config", "k": "k"},
    "parquet": {
        "tokens_column": "tokens", "dense_column": "dense", "ids_column": "ids", "values_column": "values",
        "lse_column": "lse", "logits": "logits", "shifted": "shifted", "k": "k",
    },
    "vllm": {"k": "k"},
    "megatron": {"k": "k"},
}  # fmt: skip
"""Which arguments each reader takes, and what it calls them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `import`; `run` takes what they parse to."""
    codec, tokenizer = CodecConfig(), TokenizerConfig()
    add = parser.add_argument
    add("dir", type=home, help="folder or URL of the cache; made, or added to where it is the same")
    add("files", nargs="+", type=home, help="files or folders of the other stack")
    add("--from", dest="format", required=True, choices=sorted(_READERS), help="who wrote them")
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
    add("--writer", default="import", help="name of the ledger (%(default)s)")
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


def run(args: argparse.Namespace) -> Report:
    """Imports, and prints the bias first and what came of it last.

    Raises:
        ConfigError, DataError, CacheError: arguments that do not fit each other, or files that cannot be read.
    """
    tokenizer = tokenizers.load(TokenizerConfig(bos=args.bos or None, eos=args.eos or None), args.tokenizer)
    if not tokenizer.vocab_size <= args.vocab_size:
        raise ConfigError(f"--vocab-size is {args.vocab_size}; {args.tokenizer} has {tokenizer.vocab_size} ids")
    if args.step < 0 or args.tokens_seen < 0:
        raise ConfigError(f"--step is {args.step}, --tokens-seen {args.tokens_seen}; both are at least 0")
    source = _source(args)
    corpus = PackedCorpus(Path(args.corpus), args.split, Path(args.corpus).name)
    header = _header(args, source.facts, tokenizer, corpus)
    encoder = Encoder(make_codec(header.codec, header.vocab_size), header.vocab_size, header.seed)
    print(f"{source.facts.format}: {source.facts.bias}")
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
    for line in report.lines():
        print(line)
    return report


def _source(args: argparse.Namespace) -> Source:
    takes = _OPTIONS[args.format]
    given = {
        name: getattr(args, name) for each in _OPTIONS.values() for name in each if getattr(args, name) is not None
    }
    if wrong := sorted(given.keys() - takes.keys()):
        raise ConfigError(f"--{wrong[0].replace('_', '-')} is no option of --from {args.format}")
    if args.k is not None and args.k < 1:
        raise ConfigError(f"--k is {args.k}; it is at least 1")
    source: Source = _READERS[args.format](args.files, **{takes[name]: value for name, value in given.items()})
    return source


def _header(args: argparse.Namespace, facts: Facts, tokenizer: Tokenizer, corpus: PackedCorpus) -> CacheHeader:
    if facts.k is None:
        codec = CodecConfig(args.codec, draws=args.draws, tau=args.tau, k=args.k or CodecConfig().k)
    else:
        codec = CodecConfig("topk", k=facts.k)
    # A student takes the order of its samples from the cache: any order serves here, so it is one epoch of the corpus.
    name = Path(args.corpus).name.rpartition("-")[0] or Path(args.corpus).name
    stream = Stream({name: len(corpus)}, {name: 1.0}, args.seed).describe()
    stream |= {"planned": len(corpus), "batch": 1, "writers": 1}
    return CacheHeader(
        vocab_size=args.vocab_size,
        tokenizer=tokenizer.digest,
        corpus=corpus.digest,
        sample_tokens=corpus.sample_tokens,
        samples=len(corpus),
        codec=codec,
        seed=args.seed,
        stream=stream | {"import": {"from": facts.format, "bias": facts.bias}},
    )


def _match(args: argparse.Namespace, corpus: PackedCorpus, tokenizer: Tokenizer) -> Match:
    if args.format == "megatron":
        if args.order is None:
            raise ConfigError(
                "--order is missing; Megatron-LM's cache holds no tokens, so which sample each sequence is must be "
                "told: a .npy or text file with the sample ids in the order of training"
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


def _watched(source: Iterable[Sequence]) -> Iterator[Sequence]:
    """With a progress bar where someone looks."""
    with tqdm(source, unit=" sequences", disable=None) as bar:
        yield from bar
