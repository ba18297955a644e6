"""Names and numbers of the format on disk (docs/cache.md)."""

import re

from distill.config.errors import CacheError

FORMAT = 3
MAX_VOCAB = 2**24
MAX_SAMPLE_TOKENS = 2**24
HEADER = "cache.json"
SHARDS = "shards"
CATALOG = "catalog"
LOCKS = "locks"
TOOLS_LOCK = f"{LOCKS}/tools.lock"
QUARANTINE = "quarantine"
TEMPORARY = ".tmp"
"""Suffix of local files that are not published yet; a process that may write the file may remove a leftover."""

RECORDS = "records"
LABEL_LEVELS, LABEL_TOP = 255, 32.0
ENTROPY_LEVELS = 255

TOOLS = ("compact", "index", "merge", "repair", "tools")
"""Names that no writer may have: tools and their locks have them."""

WRITER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")
"""Names that have a stream, those of tools included."""
_GROUP = 1000
"""Shards of a folder, so that no folder is large."""
_SHARD_NAME = re.compile(rf"{SHARDS}/([A-Za-z0-9_][A-Za-z0-9_-]*)/(\d{{6,}})/(\d{{9,}})\.safetensors")
_SNAPSHOT = re.compile(r"([0-9]{9,18})\.json")


def ranks_name(digest: str) -> str:
    """File of the table of ranks, named by its content, so that two processes that create one cache do no harm."""
    return f"ranks-{digest}.safetensors"


def group_name(writer: str, seq: int) -> str:
    """Folder of the shard number `seq` of a writer's stream."""
    return f"{SHARDS}/{writer}/{seq // _GROUP:06d}"


def shard_name(writer: str, seq: int) -> str:
    """File of the shard number `seq` of a writer's stream."""
    return f"{group_name(writer, seq)}/{seq:09d}.safetensors"


def shard_of(name: str) -> tuple[str, int] | None:
    """Inverse of `shard_name`: writer and number; None: it is not a shard's name."""
    match = _SHARD_NAME.fullmatch(name)
    if match is None or shard_name(match[1], int(match[3])) != name:
        return None
    return match[1], int(match[3])


def listing_name(digest: str) -> str:
    """File of a listing, named by the digest of its footer."""
    return f"{CATALOG}/{digest}.listing"


def snapshot_name(number: int) -> str:
    """File of a snapshot."""
    return f"{CATALOG}/{number:09d}.json"


def snapshot_of(name: str) -> int | None:
    """Number of a snapshot, from its name in the folder of the catalog; None: it is not a snapshot's name."""
    match = _SNAPSHOT.fullmatch(name)
    return int(match[1]) if match else None


def writer_lock(writer: str) -> str:
    """Of local caches: the lock file that a live writer holds."""
    return f"{LOCKS}/{writer}.lock"


def check_writer(writer: str) -> None:
    """CacheError when a writer's name is not fit for file names, or is kept for tools."""
    if not WRITER.fullmatch(writer):
        raise CacheError(f"writer is {writer!r}; allowed are up to 100 letters, digits, _ and - (not first)")
    if writer in TOOLS:
        raise CacheError(f"writer is {writer!r}; a writer must not be called {', '.join(TOOLS)}: tools are")
