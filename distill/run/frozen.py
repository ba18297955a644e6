"""A frozen teacher, loaded, named, and checked against the run's tokenizer, images and samples."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from distill.cache import CacheHeader
from distill.config.errors import CacheError, ConfigError
from distill.config.values import flat
from distill.data.tokenizer import TOKENIZER, load_tokenizer
from distill.engine import checkpoint
from distill.engine.checkpoint import Checkpoint
from distill.model.precision import numerics_of
from distill.run import identity
from distill.run.folder import recorded, run_of
from distill.run.identity import Lineage
from distill.run.models import check_vision, load_model, parts_of, role_in
from distill.run.run import Run
from teacher.labelling import Frozen, Own


class Teacher(NamedTuple):
    """A frozen teacher, its identity and its training."""

    model: Frozen
    name: str
    """For messages."""
    identity: str
    steps: int
    """Optimizer steps that it was trained for; 0: unknown."""
    tokens_seen: int
    """In these steps; 0: unknown."""
    corpora: frozenset[str]
    """Digests of corpora that it was trained on, as far as its checkpoint or run records them."""


def load_teacher(run: Run, prepare: Callable[[int], None] | None = None) -> Teacher:
    """The teacher that the configuration names, on the run's device; prepares the run's data for it. Collective.

    Args:
        prepare: makes the run's data, given the size of the teacher's vocabulary; None: `Run.prepare`.

    Raises:
        ConfigError: it cannot be loaded, cannot take the run's images, takes shorter samples only, or has another
            tokenizer; names both.
    """
    config = run.config
    source = config.teacher.from_
    if run.config.job == "backfill":
        source = source or config.teacher.init_from or config.init_from
    assert source is not None
    folder = Path(source.removeprefix("hf:"))
    dtype = numerics_of(config.precision, run.dist.device).dtype
    trained: Checkpoint | None = None
    model: Frozen
    if source.startswith("hf:"):
        from teacher import foreign as hf

        foreign = hf.load(folder, dtype)
        model, longest, vision = foreign, foreign.max_positions, None
    else:
        if not (folder / "config.json").exists():
            trained = checkpoint.find(folder)
        own = load_model(folder, "teacher", parts=parts_of(run), opened=trained)
        model, longest, vision = Own(own), own.config.max_positions, own.config.vision
    name, origin = run.dist.from_main(_identity(model, folder, trained) if run.dist.is_main else None)
    if isinstance(model, Own):  # transformers keeps some parts in fp32
        model.model.to(dtype)
    if longest is not None and config.data.sample_tokens > longest:
        raise ConfigError(f"data.sample_tokens is {config.data.sample_tokens}; the model in {folder} takes {longest}")
    model.model.to(run.dist.device)
    (prepare or run.prepare)(model.vocab_size)
    check_vision(f"vision of the model in {folder}", vision, config.data, run.data.tokenizer)
    home = run_of(folder) or folder.absolute()  # a Hugging Face folder has its own tokenizer
    _check_tokenizer(run, home)
    if origin is not None:
        lineage, steps = origin
        tokens, corpora = steps * lineage.tokens_per_step, [*lineage.corpora, *_corpora(home)]
    else:
        steps, tokens = (0, 0) if trained is None else _progress(trained, home)
        corpora = _corpora(home)
    return Teacher(model, str(folder), name, steps, tokens, frozenset(corpora))


def _identity(model: Frozen, folder: Path, trained: Checkpoint | None) -> tuple[str, tuple[Lineage, int] | None]:
    """The identity of weights: a lineage at a step where the checkpoint or the exported folder records one, else their
    own. Before they are rounded to the precision in which they label."""
    origin = identity.exported(folder) if trained is None else identity.stored(trained, role_in(trained, "teacher"))
    return identity.of_weights(model.model) if origin is None else origin[0].at(origin[1]), origin


def _check_tokenizer(run: Run, home: Path) -> None:
    path = home / TOKENIZER
    if not path.exists():
        return
    theirs = load_tokenizer(dataclasses.replace(run.config.data.tokenizer, bos=None, eos=None), path)
    if not run.data.tokenizer.agrees(theirs):
        raise ConfigError(
            f"data.tokenizer.file is {run.config.data.tokenizer.file or 'null (a trained one)'}; its ids (of "
            f"{run.data.tokenizer.vocab_size}) are not those of the teacher's {path} (of {theirs.vocab_size}): "
            f"set data.tokenizer.file={path}"
        )


def _progress(trained: Checkpoint, home: Path) -> tuple[int, int]:
    """Optimizer steps of a checkpoint's teacher, and the tokens in them by its run's configuration."""
    role = role_in(trained, "teacher")
    steps = int(trained.state["roles"][role]["step"])
    if not (home / "config.yaml").exists():
        return steps, 0
    config = flat(recorded(home))
    batch, length = config.get(f"{role}.train.batch"), config.get("data.sample_tokens")
    return steps, steps * int(batch or 0) * int(length or 0)


def _corpora(home: Path) -> list[str]:
    """Digests of the corpora of the caches that a run left in its folder."""
    found = []
    for path in (home / "cache" / "cache.json", *(home / "cache").glob("*/cache.json")):
        if path.exists():
            try:
                found.append(CacheHeader.load(path.parent).corpus)
            except CacheError:  # a damaged header names no corpus; the backfill does not need it
                continue
    return found
