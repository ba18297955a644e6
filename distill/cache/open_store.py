"""Opens the store of a path or URL. No torch."""

from pathlib import Path

from distill.cache.local import LocalStore
from distill.cache.store import Store
from distill.config.paths import home, is_url


def open_store(folder: str | Path) -> Store:
    """The store of a path, or of a URL like s3://bucket/folder or memory://folder; CacheError as `FarStore`."""
    if is_url(folder):
        from distill.cache.far import FarStore  # fsspec is slow to load and seldom needed

        return FarStore(str(folder))
    return LocalStore(home(str(folder).removeprefix("file://")))
