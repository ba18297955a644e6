"""Makes a listing and a snapshot of all shards of a cache, so that it opens fast at any size."""

import argparse

from distill.cache import cataloging
from distill.cache.header import CacheHeader
from distill.config.units import file_size, grouped
from distill.tools.common import add_folder, alone, caches


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folder(parser)
    parser.add_argument(
        "--rebuild", action="store_true", help="from the shards alone: what the catalog has may be damaged"
    )


def run(args: argparse.Namespace) -> int:
    for store in caches(args.dir):
        header = CacheHeader.load(store)
        with alone(store):
            made = cataloging.update(store, header, is_merging=True, is_rebuilding=args.rebuild)
        samples, size = (sum(getattr(each, name) for each in made.listings) for name in ("entries", "bytes"))
        what = f"snapshot {made.number} lists {grouped(samples)} samples, {file_size(size)}"
        print(f"{store.root}: {what if made.number >= 0 else 'there is nothing to list yet'}")
    return 0
