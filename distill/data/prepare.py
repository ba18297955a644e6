"""From a `DataConfig` to a tokenizer and packed corpora, which are made unless they are in data.dir already."""

import sys
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from distill.config import stop
from distill.config.errors import DataError
from distill.config.files import reason
from distill.config.schema import IMAGE_TOKENS, DataConfig
from distill.data import made_folders
from distill.data.corpus_files import MissingFiles
from distill.data.pack import pack
from distill.data.packed import PackedCorpus
from distill.data.raw_corpus import MARKER, RawCorpus
from distill.data.tokenizer import TOKENIZER, Tokenizer, load_tokenizer, train_tokenizer

TRAIN_CHARACTERS = 1 << 24
"""Text that a tokenizer is trained on, at most; the corpora share it equally and give what comes first."""


@dataclass(frozen=True)
class Prepared:
    tokenizer: Tokenizer
    train: dict[str, PackedCorpus]
    """By name, in the order of the configuration."""
    held_out: dict[str, PackedCorpus]
    """The same, without corpora that hold nothing out."""

    @property
    def digests(self) -> dict[str, str]:
        """Of all content, by its name in messages."""
        digests = {"data.tokenizer": self.tokenizer.digest}
        for split, corpora in (("training text", self.train), ("held-out text", self.held_out)):
            digests |= {f"data.corpora.{name}, {split}": corpus.digest for name, corpus in corpora.items()}
        return digests


def prepare(config: DataConfig, folder: Path, model_vocab_size: int) -> Prepared:
    """Tokenizer and packed corpora of a configuration, kept in `folder`.

    Raises:
        ConfigError: no room in the vocabulary that is to be trained.
        DataError: text does not exist and was not packed before, text or tokenizer cannot be read, the tokenizer has
            more ids than the model, a split is shorter than one sample.
    """
    corpora = _raw_corpora(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made_folders.sweep(folder)
        tokenizer = _tokenizer(config, folder, corpora)
        if tokenizer.vocab_size > model_vocab_size:
            raise DataError(
                f"the tokenizer {config.tokenizer.file or '(trained)'} has {tokenizer.vocab_size} ids; "
                f"model.vocab_size is {model_vocab_size}, at least as many are needed"
            )
        return _open(
            config, tokenizer, {name: _packed(config, folder, name, corpora[name], tokenizer) for name in corpora}
        )
    except OSError as error:
        raise DataError(f"data.dir is {folder}; cannot be written: {reason(error)}") from error


def reopen(config: DataConfig, folder: Path, tokenizer: Tokenizer) -> Prepared | None:
    """What `prepare` left in `folder`, found by the corpora's names alone: their files may be gone.

    Returns:
        None where a corpus has no place there, or several, as in a folder that differing runs share.
    """
    chosen = {}
    for name, corpus in config.corpora.items():
        places = made_folders.find(folder, name)
        if len(places) != 1:
            places = made_folders.find(folder, name, made_folders.about_corpus(config, corpus, tokenizer))
        if len(places) != 1:
            return None
        chosen[name] = places[0]
    return _open(config, tokenizer, chosen)


def _open(config: DataConfig, tokenizer: Tokenizer, places: dict[str, Path]) -> Prepared:
    train = {name: PackedCorpus(place, "train", name) for name, place in places.items()}
    held_out = {
        name: PackedCorpus(places[name], "held_out", name)
        for name, corpus in config.corpora.items()
        if corpus.has_held_out
    }
    return Prepared(tokenizer, train, held_out)


def _raw_corpora(config: DataConfig) -> dict[str, RawCorpus | MissingFiles]:
    """By name; the error of a corpus whose files are gone, since it may have been packed before."""
    corpora: dict[str, RawCorpus | MissingFiles] = {}
    problems: list[DataError] = []
    for name, corpus in config.corpora.items():
        try:
            corpora[name] = RawCorpus(name, corpus)
        except MissingFiles as error:
            corpora[name] = error
            problems.append(error)
        except DataError as error:
            problems.append(error)
    if len(corpora) < len(config.corpora):
        raise DataError("\n".join(map(str, problems)))
    return corpora


def _tokenizer(config: DataConfig, folder: Path, corpora: dict[str, RawCorpus | MissingFiles]) -> Tokenizer:
    if config.tokenizer.file is not None:
        return load_tokenizer(config.tokenizer)
    t, about = config.tokenizer, made_folders.about_tokenizer(config)
    present = [corpus for corpus in corpora.values() if isinstance(corpus, RawCorpus)]
    if missing := next((corpus for corpus in corpora.values() if isinstance(corpus, MissingFiles)), None):
        return load_tokenizer(t, made_folders.find_one(folder, "tokenizer", about, missing) / TOKENIZER)
    parts: list[object] = ["tokenizer", t.vocab_size, t.bos, t.eos, TRAIN_CHARACTERS, [c.identity for c in present]]
    if config.has_images:
        parts.append(IMAGE_TOKENS)

    def train(new: Path, scratch: Path) -> None:
        share = TRAIN_CHARACTERS // len(present)
        texts = chain.from_iterable(_train_texts(corpus, scratch, share) for corpus in present)
        train_tokenizer(t, texts, config.has_images).save(new / TOKENIZER)

    return load_tokenizer(t, made_folders.make(folder, "tokenizer", parts, train, about) / TOKENIZER)


def _train_texts(corpus: RawCorpus, scratch: Path, characters: int) -> Iterator[str]:
    for document in stop.checked(corpus.documents(scratch)):
        if not document.held_out:
            yield document.text.replace(MARKER, "\n")[:characters] if document.images else document.text[:characters]
            characters -= len(document.text)
            if characters <= 0:
                return


def _packed(
    config: DataConfig, folder: Path, name: str, corpus: RawCorpus | MissingFiles, tokenizer: Tokenizer
) -> Path:
    """The folder of a packed corpus."""
    about = made_folders.about_corpus(config, config.corpora[name], tokenizer)
    if isinstance(corpus, MissingFiles):
        place = made_folders.find_one(folder, name, about, corpus)
        print(f"data.corpora.{name}: its files are gone; {place}, packed from them, is used", file=sys.stderr)
        return place
    specials = (tokenizer.bos_id, tokenizer.eos_id)
    parts: list[object] = ["corpus", tokenizer.digest, specials, config.sample_tokens, corpus.identity]
    if corpus.config.has_images:
        parts.append(astuple(config.images))
    if corpus.config.whole_documents:
        parts.append("whole")
    fill = partial(pack, corpus, tokenizer, config.images, config.sample_tokens)
    return made_folders.make(folder, name, parts, fill, about)
