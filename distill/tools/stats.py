"""What is in a cache: how much of the corpus, bytes for what, from which teachers, how far behind. No torch."""

import argparse
from collections.abc import Sequence
from typing import Any

from distill.cache.format import HEADER, LEDGER, QUARANTINE, SHARDS, TEMPORARY, ranks_name
from distill.cache.header import CacheHeader
from distill.cache.ledger import Origin, ShardRow
from distill.cache.shard import WIDTHS
from distill.cache.store import Store
from distill.cache.view import ledger_readers, settle
from distill.config import json_text
from distill.config.paths import home
from distill.config.terminal import advancing
from distill.tools.common import add_folder, add_json, caches, check_at_least_one, is_live, newest_records
from distill.tools.flops import flop_ledger
from distill.tools.stats_text import histogram_lines, stats_lines

_DEEP = 256
"""Samples of --deep."""


def stats(store: Store, *, quick: bool = False) -> dict[str, Any]:
    """Plain numbers, lists and texts; bytes per token are those of the shards that count.

    quick: header and ledgers alone, nothing of the shards: which records are superseded is not known then, and
    coverage is an upper bound.

    Raises:
        CacheError: no cache, or a damaged header, ledger or index.
    """
    header = CacheHeader.load(store)
    ledgers = ledger_readers(store, header)
    rows, retired = settle(entry for ledger in ledgers for entry in ledger.poll())
    records, tokens = sum(row.samples for row in rows), sum(row.tokens for row in rows)
    if quick:
        covered = min(records, header.samples)
    else:
        with advancing("indexes", sum(row.index_bytes for row in rows)) as advance:
            covered = newest_records(store, header, rows, advance).covered
    sizes = _sizes(store, header, rows, retired)
    return {
        "folder": store.root,
        "header": header.json() | {"digest": header.identity},
        "exact": not quick,
        "samples": covered,
        "coverage": covered / max(header.samples, 1),
        "records": records,
        "shards": len(rows),
        "tokens": tokens,
        "atoms": sum(row.atoms for row in rows),
        "bytes": sizes,
        "bytes_per_token": sum(row.bytes for row in rows) / max(tokens, 1),
        "atoms_per_token": sum(row.atoms for row in rows) / max(tokens, 1),
        "origins": _origins(rows),
        "lag": lag(rows),
        "flops": flop_ledger(rows, header.sample_tokens),
        "writers": [
            {
                "name": each.writer,
                "rows": each.seq,
                "torn": each.torn,
                "finished": each.finished,
                "alive": is_live(store, each.writer),
            }
            for each in ledgers
        ],
    }


def _sizes(
    store: Store, header: CacheHeader, rows: Sequence[ShardRow], retired: Sequence[ShardRow]
) -> dict[str, dict[str, int]]:
    """Bytes of the shards that count, by column; of the other files that count; of those that do not."""
    records = sum(row.samples for row in rows)
    shards = {name: width * records for name, width in WIDTHS.items()}
    indexes = sum(row.index_bytes for row in rows)
    shards |= {"headers": indexes - sum(shards.values()), "records": sum(row.bytes for row in rows) - indexes}
    files = store.names(SHARDS)
    there, counted = set(files), {row.shard for row in [*rows, *retired]}
    others = [name for name in files if name not in counted]
    return {
        "shards": shards,
        "others": {
            HEADER: store.size(HEADER),
            "ranks": store.size(ranks_name(header.ranks)),
            "ledgers": store.bytes_in(LEDGER),
        },
        "of no use": {
            "replaced by compaction": sum(row.bytes for row in retired if row.shard in there),
            "without a row": _size(store, [n for n in others if not n.endswith(TEMPORARY)]),
            "temporary": _size(store, [n for n in others if n.endswith(TEMPORARY)]),
            "quarantine": store.bytes_in(QUARANTINE),
        },
    }


def _size(store: Store, names: list[str]) -> int:
    """Of files in `shards/`, without those that are gone meanwhile."""
    return sum(store.size(name) for each in names if store.exists(name := f"{SHARDS}/{each}"))


def _origins(rows: Sequence[ShardRow]) -> list[dict[str, Any]]:
    """One entry for each teacher and way of coming here, in the order of their first steps."""
    groups: dict[tuple[str, str, bool], list[Origin]] = {}
    for row in rows:
        for origin in row.origins:
            groups.setdefault((origin.teacher, origin.source, origin.seen_before), []).append(origin)
    origins_of = []
    for (teacher, source, seen_before), origins in groups.items():
        losses = [(o.last_step, o.loss) for o in origins if o.loss is not None]
        origins_of.append(
            {
                "teacher": teacher,
                "source": source,
                "seen_before": seen_before,
                "samples": sum(o.samples for o in origins),
                "tokens": sum(o.tokens for o in origins),
                "first_step": min(o.first_step for o in origins),
                "last_step": max(o.last_step for o in origins),
                "best_loss": min((loss for _, loss in losses), default=None),
                "last_loss": max(losses, default=(0, None), key=lambda each: each[0])[1],
            }
        )
    return sorted(origins_of, key=lambda each: (each["first_step"], each["teacher"], each["source"]))


def lag(rows: Sequence[ShardRow]) -> dict[str, list[float]]:
    """Of each shard's origin, in the order of steps: last step, mean label loss, and what it exceeds the best loss by
    (nats), with the tokens that it is a mean of."""
    origins = [(o.last_step, o.loss, o.tokens) for row in rows for o in row.origins if o.loss is not None]
    origins.sort(key=lambda each: each[0])
    best = min((loss for _, loss, _ in origins), default=0.0)
    return {
        "step": [step for step, _, _ in origins],
        "loss": [loss for _, loss, _ in origins],
        "lag": [loss - best for _, loss, _ in origins],
        "tokens": [tokens for _, _, tokens in origins],
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folder(parser)
    add_json(parser)
    parser.add_argument(
        "--quick", action="store_true", help="header and ledgers alone; coverage is an upper bound then"
    )
    parser.add_argument(
        "--deep", type=int, nargs="?", const=_DEEP, metavar="SAMPLES",
        help="decode so many samples, always the same ones, for histograms (%(const)s)",
    )  # fmt: skip
    parser.add_argument(
        "--html", metavar="FILE", type=home, help="write all of it as a page with charts, too (includes --deep)"
    )


def run(args: argparse.Namespace) -> int:
    check_at_least_one("--deep", args.deep)
    samples = args.deep or (_DEEP if args.html else None)
    everything = []
    for number, store in enumerate(caches(args.dir)):
        entry = stats(store, quick=args.quick)
        if samples is not None and entry["records"]:
            from distill.tools.histograms import histograms  # torch

            entry["sampled"] = histograms(store, samples)
        everything.append(entry)
        if args.json:
            print(json_text.dumps(entry))
        else:
            lines = stats_lines(entry) + (histogram_lines(entry["sampled"]) if "sampled" in entry else [])
            print(("\n" if number else "") + "\n".join(lines), flush=True)
    if args.html:
        from distill.tools.cache_page import write

        write(args.html, everything)
        if not args.json:
            print(f"\n{args.html}")
    return 0
