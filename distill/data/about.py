"""What a packed corpus or a trained tokenizer was asked to be made of, kept beside it: `about.json`.

By it what was made is found again when the files that it was made from are gone.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill.config.errors import DataError
from distill.config.paths import home
from distill.config.schema import CorpusConfig, DataConfig
from distill.data.tokenizer import Tokenizer

ABOUT = "about.json"

About = dict[str, Any]


def of_corpus(config: DataConfig, corpus: CorpusConfig, tokenizer: Tokenizer) -> About:
    """All that decides a packed corpus but the files' sizes and times."""
    about = _sources(corpus) | {"tokenizer": tokenizer.digest, "bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    about["sample_tokens"] = config.sample_tokens
    return about | ({"images": asdict(config.images)} if corpus.has_images else {})


def of_tokenizer(config: DataConfig) -> About:
    """All that decides a trained tokenizer but the files' sizes and times."""
    t, corpora = config.tokenizer, list(config.corpora.values())
    return {"vocab_size": t.vocab_size, "bos": t.bos, "eos": t.eos, "corpora": [_sources(each) for each in corpora]}


def write(about: About, folder: Path) -> None:
    (folder / ABOUT).write_text(json.dumps(about, indent=1, default=str) + "\n", encoding="utf-8")


def find(folder: Path, name: str, about: About) -> list[Path]:
    """The folders `name`-KEY in `folder` that were made of the same, sorted."""
    wanted = json.loads(json.dumps(about, default=str))
    return [place for place in sorted(folder.glob(f"{name}-{'[0-9a-f]' * 16}")) if _read(place) == wanted]


def only(folder: Path, name: str, about: About, missing: DataError) -> Path:
    """The one folder that was made of the same.

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


def _sources(corpus: CorpusConfig) -> About:
    """The corpus as configured; its weight is no part of what is packed."""
    plain = asdict(corpus)
    del plain["weight"]
    for key in ("files", "held_out_files"):
        plain[key] = [os.path.abspath(home(pattern)) for pattern in plain[key]]
    return plain | {"source": corpus.source.value}


def _read(place: Path) -> About | None:
    try:
        found: About = json.loads((place / ABOUT).read_bytes())
    except (OSError, ValueError):  # of an older version, or not ours
        return None
    return found
