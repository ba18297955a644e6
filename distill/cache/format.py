"""Names and numbers of the format on disk, which docs/format.md describes."""

from __future__ import annotations

import re

from distill.config.errors import CacheError

FORMAT = 2
MAX_VOCAB = 2**24
MAX_SAMPLE_TOKENS = 2**24
HEADER = "cache.json"
SHARDS = "shards"
LEDGER = "ledger"
TOOLS_LOCK = ".tools.lock"
QUARANTINE = "quarantine"
TEMPORARY = ".tmp"
"""Suffix of local files that are not published yet; whoever would write the file may remove a leftover."""

INDEX = ("sample_ids", "digests", "checks", "ends", "steps", "atoms", "origins")
RECORDS = "records"
LABEL_LEVELS, LABEL_TOP = 255, 32.0
ENTROPY_LEVELS = 255


def ranks_name(digest: str) -> str:
    """The table of ranks is named by its content, so that two who create one cache cannot harm each other."""
    return f"ranks-{digest}.safetensors"


def shard_name(writer: str, seq: int, digest: str) -> str:
    return f"{writer}-{seq:06d}-{digest}.safetensors"


def writer_lock(writer: str) -> str:
    """Of local caches: the lock file that a live writer holds."""
    return f"{LEDGER}/{writer}.lock"


def row_object(writer: str, seq: int) -> str:
    return f"{LEDGER}/{writer}/{seq:09d}.json"


def check_writer(writer: str) -> None:
    """CacheError when a writer's name cannot be a file's."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", writer):
        raise CacheError(f"writer is {writer!r}; allowed are letters, digits and _ - (not first)")
