"""Folders of packed corpora and trained tokenizers in data.dir: `<name>-<key>`, each published whole.

The key is a digest of all that decides the content. `about.json` in each folder records the settings that it was made
with, by which the folder is found again when the files that it was made from are gone.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash

from distill.config.errors import DataError
from distill.config.files import publish_folder, write_text
from distill.config.paths import home
from distill.config.schema import CorpusConfig, DataConfig, Source
from distill.data.tokenizer import Tokenizer

FORMAT = 1
"""Part of every key: raise it when equal configurations would give other bytes."""
ABOUT = "about.json"
ABANDONED_SECONDS = 3600.0
"""A temporary folder in which nothing was written for so long belongs to nobody."""

About = dict[str, Any]


def about_corpus(config: DataConfig, corpus: CorpusConfig, tokenizer: Tokenizer) -> About:
    """All that decides a packed corpus but the files' sizes and times."""
    about = _sources(corpus) | {"tokenizer": tokenizer.digest, "bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    about["sample_tokens"] = config.sample_tokens
    return about | ({"images": asdict(config.images)} if corpus.has_images else {})


def about_tokenizer(config: DataConfig) -> About:
    """All that decides a trained tokenizer but the files' sizes and times."""
    t, corpora = config.tokenizer, list(config.corpora.values())
    return {"vocab_size": t.vocab_size, "bos": t.bos, "eos": t.eos, "corpora": [_sources(each) for each in corpora]}


def _sources(corpus: CorpusConfig) -> About:
    """The corpus as configured, but for its weight, which does not decide what is packed."""
    plain = asdict(corpus)
    del plain["weight"]
    if corpus.source is not Source.law:
        del plain["law"]  # so that folders of earlier versions are found
    for key in ("files", "held_out_files"):
        plain[key] = [os.path.abspath(home(pattern)) for pattern in plain[key]]
    return plain | {"source": corpus.source.value}


def make(folder: Path, name: str, parts: list[object], fill: Callable[[Path, Path], None], about: About) -> Path:
    """The folder `name`-KEY in `folder`, made unless it exists; any number of processes may make it at once.

    Args:
        parts: all that decides the content; the key is a digest of their `repr`.
        fill: is called with a new folder, which it fills, and one for its own temporary files.
    """
    place = folder / f"{name}-{xxhash.xxh3_64_hexdigest(repr((FORMAT, *parts)).encode())}"
    if place.is_dir():
        return place
    with tempfile.TemporaryDirectory(prefix=f".{place.name}.", suffix=".tmp", dir=folder) as temporary:
        new, scratch = Path(temporary, "new"), Path(temporary, "scratch")
        new.mkdir()
        scratch.mkdir()
        fill(new, scratch)
        write_text(new / ABOUT, json.dumps(about, indent=1, default=str) + "\n")
        try:
            publish_folder(new, place)
        except OSError:
            if not place.is_dir():  # else another process was first, with the same content
                raise
    return place


def find(folder: Path, name: str, about: About | None = None) -> list[Path]:
    """The folders `name`-KEY in `folder` that were made with the settings `about`, or all of them, sorted."""
    wanted = json.loads(json.dumps(about, default=str))
    places = sorted(folder.glob(f"{name}-{'[0-9a-f]' * 16}"))
    return [place for place in places if about is None or _read_about(place) == wanted]


def find_one(folder: Path, name: str, about: About, missing: DataError) -> Path:
    """The one folder that was made with the settings `about`.

    Raises:
        DataError: there is none, or there are several, made from these files at different times.
    """
    places = find(folder, name, about)
    if len(places) == 1:
        return places[0]
    if places:
        names = ", ".join(place.name for place in places)
        raise DataError(f"{missing}; in data.dir, {folder}, {names} were made from these files: keep one of them")
    what = "no tokenizer was trained on" if name == "tokenizer" else "nothing was packed from"
    raise DataError(f"{missing}; in data.dir, {folder}, {what} these files with these settings")


def _read_about(place: Path) -> About | None:
    try:
        about: About = json.loads((place / ABOUT).read_bytes())
    except (OSError, ValueError):  # made by an older version, or by something else
        return None
    return about


def sweep(folder: Path) -> None:
    """Removes what killed processes left behind, but nothing that another process may be writing now."""
    for temporary in folder.glob(f".*-{'[0-9a-f]' * 16}.*.tmp"):
        try:
            newest = max(path.stat().st_mtime for path in (temporary, *temporary.rglob("*")))
        except FileNotFoundError:
            continue  # its owner has just removed it
        if time.time() - newest > ABANDONED_SECONDS:
            shutil.rmtree(temporary, ignore_errors=True)
