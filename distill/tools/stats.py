"""What is in a cache: how much of the corpus, bytes for what, from which teachers, and their loss by step. No torch."""

import argparse
import dataclasses
from typing import Any

import numpy as np

from distill.cache.format import CATALOG, HEADER, QUARANTINE, SHARDS, ranks_name
from distill.cache.header import CacheHeader
from distill.cache.listing import Totals
from distill.cache.loss_curve import LossSums
from distill.cache.origins import Origin, summed
from distill.cache.shard_header import COLUMNS, WIDTH, Replaced
from distill.cache.snapshot import newest_snapshot
from distill.cache.store import Store
from distill.cache.tail import Ranges, replaced_by_tools
from distill.cache.view import View, asked, open_view, snapshot_view
from distill.config import json_text
from distill.config.paths import home
from distill.tools.common import add_folder, add_json, caches, check_at_least_one, is_live
from distill.tools.flops import flop_ledger
from distill.tools.purge import replaced_shards
from distill.tools.stats_text import histogram_lines, stats_lines

_DEEP = 256
"""Samples of --deep."""


def stats(store: Store, *, quick: bool = False) -> dict[str, Any]:
    """Plain numbers, lists and texts; bytes per token are those of the shards that count.

    quick: of the newest snapshot alone, without what came after it, from the footers of its listings; coverage is an
    upper bound where it has several.

    Raises:
        CacheError: no cache, or damage.
    """
    header = CacheHeader.load(store)
    newest = newest_snapshot(store, header.identity)
    view = snapshot_view(store, header, newest) if quick and newest.number >= 0 else open_view(store, header)
    is_exact = not quick or len(view.parts) == 1
    most = min(sum(listing.entries for listing in view.listings), header.samples)
    view, covered = asked(view, lambda each: each.covered if is_exact else most)
    totals = view.totals
    if quick:
        shards, others = _columns(totals), {"catalog": sum(ref.bytes for ref in view.snapshot.listings)}
        sizes, writers = {"shards": shards, "others": others}, _writers(view)
    else:
        view, (names, rows) = asked(view, View.origins)
        firsts = rows[rows["number"] == 0]
        replaced = replaced_by_tools(store, header, {})
        sizes = _sizes(store, header, totals, int(firsts["records_at"].astype(np.int64).sum()))
        numbers, counts = np.unique(firsts["writer"], return_counts=True)
        by_writer = {names.writers[i]: n for i, n in zip(numbers.tolist(), counts.tolist(), strict=True)}
        writers = _writers(view, by_writer, Ranges(replaced).joined())
    return {
        "folder": store.root,
        "header": header.json() | {"digest": header.identity},
        "snapshot": {"number": view.snapshot.number, "made": view.snapshot.made, "listings": len(view.listings)},
        "quick": quick,
        "exact": is_exact,
        "samples": covered,
        "coverage": covered / max(header.samples, 1),
        "records": totals.samples,
        "shards": totals.shards,
        "tokens": totals.tokens,
        "atoms": totals.atoms,
        "bytes": sizes,
        "bytes_per_token": totals.bytes / max(totals.tokens, 1),
        "atoms_per_token": totals.atoms / max(totals.tokens, 1),
        "origins": _origins(view),
        "losses": loss_curves(view.losses),
        "flops": flop_ledger(view.summary, header.sample_tokens),
        "writers": writers,
    }


def _columns(totals: Totals) -> dict[str, int]:
    """Bytes of shards by column; what is not in the index is not told apart."""
    columns = {name: width * totals.samples for name, (_, width) in COLUMNS.items()}
    return columns | {"headers and records": totals.bytes - WIDTH * totals.samples}


def _sizes(store: Store, header: CacheHeader, totals: Totals, in_front: int) -> dict[str, dict[str, int]]:
    """Bytes of the shards that count, by column; of the other files that count; of those that do not.

    in_front: bytes in front of records, headers and indexes of all shards.
    """
    shards = _columns(totals)
    del shards["headers and records"]
    shards |= {"headers": in_front - WIDTH * totals.samples, "records": totals.bytes - in_front}
    replaced = sum(store.map(store.size, replaced_shards(store, header)))
    return {
        "shards": shards,
        "others": {
            HEADER: store.size(HEADER),
            "ranks": store.size(ranks_name(header.ranks)) if header.ranks else 0,
            "catalog": store.bytes_in(CATALOG),
            "marks and leftovers": max(store.bytes_in(SHARDS) - totals.bytes - replaced, 0),
        },
        "of no use": {"replaced by compaction": replaced, "quarantine": store.bytes_in(QUARANTINE)},
    }


def _writers(
    view: View, shards: dict[str, int] | None = None, replaced: list[Replaced] | None = None
) -> list[dict[str, Any]]:
    """One entry for each stream; shards: those that count, by writer, and `replaced` ranges: None: not known."""
    entries = []
    for name, state in sorted(view.streams.items()):
        entry = {"name": name, "count": state.count, "step": state.step, "finished": state.finished}
        entry["alive"] = is_live(view.store, name)
        if shards is not None and replaced is not None:
            gone = sum(min(each.last + 1, state.count) - each.first for each in replaced if each.writer == name)
            here = shards.get(name, 0)
            entry |= {"shards": here, "replaced": gone, "marks": state.count - here - gone}
        entries.append(entry)
    return entries


def _origins(view: View) -> list[dict[str, Any]]:
    """One entry for each teacher and way of coming here, in the order of their first steps."""
    entries, losses = [], view.losses
    for origin in summed(dataclasses.replace(each, flops_per_token=0.0) for each in view.summary):
        curve = losses.curve(origin.teacher, origin.source).losses.tolist()
        entry = {field: getattr(origin, field) for field in _SHOWN}
        entries.append(entry | {"best_loss": min(curve, default=None), "last_loss": curve[-1] if curve else None})
    return entries


_SHOWN = tuple(each.name for each in dataclasses.fields(Origin) if each.name not in ("loss", "flops_per_token"))


def loss_curves(losses: LossSums) -> list[dict[str, Any]]:
    """For each teacher and source, its mean label loss by its step: first step of each bin, nats, tokens."""
    curves = []
    for teacher, source in losses.teachers():
        curve = losses.curve(teacher, source)
        columns = {"step": curve.first_steps, "loss": curve.losses, "tokens": curve.tokens}
        curves.append({"teacher": teacher, "source": source} | {name: each.tolist() for name, each in columns.items()})
    return curves


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folder(parser)
    add_json(parser)
    parser.add_argument(
        "--quick", action="store_true", help="the newest snapshot alone, without what has come after it"
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
