"""Names and numbers of the format on disk (docs/cache.md)."""

import re
from typing import NamedTuple

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
"""Suffix of local files that are not published yet; a process that may write the file may remove a leftover."""

INDEX = ("sample_ids", "digests", "checks", "ends", "steps", "atoms", "origins")
RECORDS = "records"
LABEL_LEVELS, LABEL_TOP = 255, 32.0
ENTROPY_LEVELS = 255


def ranks_name(digest: str) -> str:
    """File of the table of ranks, named by its content, so that two processes that create one cache do no harm."""
    return f"ranks-{digest}.safetensors"


def shard_name(writer: str, seq: int, digest: str) -> str:
    """File of the shard of a ledger's row; the digest is that of the file."""
    return f"{writer}-{seq:06d}-{digest}.safetensors"


class RowName(NamedTuple):
    """The ledger's row that the name of a shard's file belongs to."""

    writer: str
    seq: int


def row_of(shard: str) -> RowName | None:
    """Inverse of `shard_name`, also for a temporary file; None: it is not a shard's name."""
    parts = shard.removesuffix(TEMPORARY).removesuffix(".safetensors").rsplit("-", 2)
    if len(parts) != 3 or not parts[1].isdigit() or ".safetensors" not in shard:
        return None
    return RowName(parts[0], int(parts[1]))


def writer_lock(writer: str) -> str:
    """Of local caches: the lock file that a live writer holds."""
    return f"{LEDGER}/{writer}.lock"


def row_object(writer: str, seq: int) -> str:
    """Object of a ledger's row, where files cannot grow."""
    return f"{LEDGER}/{writer}/{seq:09d}.json"


def check_writer(writer: str) -> None:
    """CacheError when a writer's name is not fit for file names."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", writer):
        raise CacheError(f"writer is {writer!r}; allowed are letters, digits and _ - (not first)")
