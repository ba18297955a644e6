"""From a `DataConfig` to a tokenizer and packed corpora: found if they are there, else made.

In the folder: `tokenizer-<key>/tokenizer.json` and `<corpus>-<key>/`, where the key is a digest of all that decides the
content. Each appears whole, under a name that says what it is, so any number of processes may prepare at once: all make
the same, one is kept.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import xxhash

from distill.config import stop
from distill.config.errors import DataError
from distill.config.files import reason, sync
from distill.config.schema import IMAGE_TOKENS, DataConfig
from distill.data import about
from distill.data import tokenizer as tokenizers
from distill.data.pack import pack
from distill.data.packed import PackedCorpus
from distill.data.source import MARKER, Corpus, MissingFiles
from distill.data.tokenizer import Tokenizer

FORMAT = 1
"""Goes into every key: raise it when equal configurations would give other bytes."""

TRAIN_CHARACTERS = 1 << 24
"""Text that a tokenizer is trained on, at most; the corpora share it equally and give what comes first."""

ABANDONED_SECONDS = 3600.0
"""A temporary folder in which nothing was written for so long belongs to nobody."""


@dataclass(frozen=True)
class Prepared:
    tokenizer: Tokenizer
    train: dict[str, PackedCorpus]
    """By name, in the order of the configuration."""
    held_out: dict[str, PackedCorpus]
    """The same, without corpora that hold nothing out."""

    @property
    def digests(self) -> dict[str, str]:
        """Of all content, by what a message calls it."""
        found = {"data.tokenizer": self.tokenizer.digest}
        for split, corpora in (("training text", self.train), ("held-out text", self.held_out)):
            found |= {f"data.corpora.{name}, {split}": corpus.digest for name, corpus in corpora.items()}
        return found


def prepare(config: DataConfig, folder: Path, model_vocab_size: int) -> Prepared:
    """Tokenizer and packed corpora of a configuration, kept in `folder`.

    Raises:
        ConfigError: no room in the vocabulary that is to be trained.
        DataError: text is not there and was not packed before, text or tokenizer cannot be read, the tokenizer has more
            ids than the model, a split is shorter than one sample.
    """
    corpora: dict[str, Corpus | MissingFiles] = {}
    problems, all_gone = [], True
    for name, named in config.corpora.items():
        try:
            corpora[name] = Corpus(name, named)
        except DataError as error:
            problems.append(str(error))
            if isinstance(error, MissingFiles):
                corpora[name] = error  # it may have been packed before
            else:
                all_gone = False
    if not all_gone:
        raise DataError("\n".join(problems))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        tokenizer = _tokenizer(config, folder, corpora)
        if tokenizer.vocab_size > model_vocab_size:
            raise DataError(
                f"the tokenizer {config.tokenizer.file or '(trained)'} has {tokenizer.vocab_size} ids; "
                f"model.vocab_size is {model_vocab_size}, at least as many are needed"
            )
        prepared = Prepared(tokenizer, {}, {})
        for name, corpus in corpora.items():
            what = about.of_corpus(config, config.corpora[name], tokenizer)
            if isinstance(corpus, MissingFiles):
                place = about.only(folder, name, what, corpus)
                print(f"data.corpora.{name}: its files are gone; {place}, packed from them, is used", file=sys.stderr)
                _open(prepared, config, name, place)
                continue
            parts: list[object] = [
                "corpus",
                tokenizer.digest,
                (tokenizer.bos_id, tokenizer.eos_id),
                config.sample_tokens,
            ]
            parts.append(corpus.identity)
            if corpus.config.has_images:
                parts.append(astuple(config.images))
            if corpus.config.whole_documents:
                parts.append("whole")
            place = folder / f"{name}-{_key(*parts)}"
            _publish(place, partial(pack, corpus, tokenizer, config.images, config.sample_tokens), what)
            _open(prepared, config, name, place)
    except OSError as error:
        raise DataError(f"data.dir is {folder}; cannot be written: {reason(error)}") from error
    return prepared


def reopen(config: DataConfig, folder: Path, tokenizer: Tokenizer) -> Prepared | None:
    """What `prepare` left in `folder`, found by the corpora's names alone: their files may be gone.

    Returns:
        None where a corpus has no place there, or several, as in a folder that differing runs share.
    """
    prepared = Prepared(tokenizer, {}, {})
    for name, corpus in config.corpora.items():
        places = list(folder.glob(f"{name}-{'[0-9a-f]' * 16}"))
        if len(places) != 1:
            places = about.find(folder, name, about.of_corpus(config, corpus, tokenizer))
        if len(places) != 1:
            return None
        _open(prepared, config, name, places[0])
    return prepared


def _open(prepared: Prepared, config: DataConfig, name: str, place: Path) -> None:
    corpus = config.corpora[name]
    prepared.train[name] = PackedCorpus(place, "train", name)
    if corpus.held_out > 0 or corpus.held_out_files:
        prepared.held_out[name] = PackedCorpus(place, "held_out", name)


def _tokenizer(config: DataConfig, folder: Path, corpora: dict[str, Corpus | MissingFiles]) -> Tokenizer:
    if config.tokenizer.file is not None:
        return tokenizers.load(config.tokenizer)
    t, what = config.tokenizer, about.of_tokenizer(config)
    there = [corpus for corpus in corpora.values() if isinstance(corpus, Corpus)]
    if len(there) < len(corpora):
        missing = next(corpus for corpus in corpora.values() if isinstance(corpus, MissingFiles))
        return tokenizers.load(t, about.only(folder, "tokenizer", what, missing) / "tokenizer.json")
    parts: list[object] = [t.vocab_size, t.bos, t.eos, TRAIN_CHARACTERS, [c.identity for c in there]]
    if config.has_images:
        parts.append(IMAGE_TOKENS)
    place = folder / f"tokenizer-{_key('tokenizer', *parts)}"

    def make(new: Path, scratch: Path) -> None:
        share = TRAIN_CHARACTERS // len(there)
        texts = chain.from_iterable(_train_texts(corpus, scratch, share) for corpus in there)
        tokenizers.train(t, texts, config.has_images).save(new / "tokenizer.json")

    _publish(place, make, what)
    return tokenizers.load(t, place / "tokenizer.json")


def _train_texts(corpus: Corpus, scratch: Path, characters: int) -> Iterator[str]:
    for document in stop.checked(corpus.documents(scratch)):
        if not document.held_out:
            yield document.text.replace(MARKER, "\n")[:characters] if document.images else document.text[:characters]
            characters -= len(document.text)
            if characters <= 0:
                return


def _key(*parts: object) -> str:
    return xxhash.xxh3_64_hexdigest(repr((FORMAT, *parts)).encode())


def _publish(place: Path, make: Callable[[Path, Path], None], what: about.About) -> None:
    """Makes folder `place` unless it is there: `make(new, scratch)` fills a temporary one, which is renamed.

    what: goes into it, too, to find it by.
    """
    if place.is_dir():
        return
    with tempfile.TemporaryDirectory(prefix=f".{place.name}.", suffix=".tmp", dir=place.parent) as temporary:
        new, scratch = Path(temporary, "new"), Path(temporary, "scratch")
        new.mkdir()
        scratch.mkdir()
        make(new, scratch)
        about.write(what, new)
        sync(new / about.ABOUT)
        sync(new)
        try:
            new.rename(place)
        except OSError:
            if not place.is_dir():  # else another process was first, with the same content
                raise
        sync(place.parent)


def _sweep(folder: Path) -> None:
    """Removes what killed processes left behind; not what another process may be writing now."""
    for temporary in folder.glob(f".*-{'[0-9a-f]' * 16}.*.tmp"):
        try:
            newest = max(path.stat().st_mtime for path in (temporary, *temporary.rglob("*")))
        except FileNotFoundError:
            continue  # its owner finished meanwhile
        if time.time() - newest > ABANDONED_SECONDS:
            shutil.rmtree(temporary, ignore_errors=True)
