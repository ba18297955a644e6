"""Named parts that a configuration chooses between, in one registry a kind; each part is registered once.

An entry of ours is a place, `module:name`, so that names are known before torch is loaded. The key `plugins` names
modules of a user, which are imported first and add entries of their own:

    from distill.config.registry import FACTORS
    FACTORS.add("toy", ToyFactor)
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from distill.config.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")


class Registry(Generic[T]):
    """Parts of one kind by name. As metadata of a schema field, the list of its allowed values."""

    def __init__(self, kind: str, entries: dict[str, T | str]):
        self.kind = kind
        self._entries = dict(entries)

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def add(self, name: str, entry: T | str) -> None:
        """Registers a part, or the place of one, `module:name`; ConfigError: the name is taken by another part."""
        if self._entries.setdefault(name, entry) != entry:
            raise ConfigError(f"{self.kind} {name} is registered twice; choose another name")

    def __getitem__(self, name: str) -> T:
        """The part of a name that `problem` accepts."""
        return loaded(self._entries[name])

    def problem(self, key: str, value: str) -> str | None:
        """A sentence about a value that is no name of a part."""
        return None if value in self._entries else f"{key} is {value}; allowed: {', '.join(self._entries)}"


def loaded(entry: Any) -> Any:
    """An entry, or what is at the place that it names."""
    if not isinstance(entry, str):
        return entry
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)


def import_plugins(modules: Sequence[str]) -> list[str]:
    """Imports modules, found as Python finds them or in the working folder; a sentence for each that cannot be."""
    if modules and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    problems = []
    for module in modules:
        try:
            importlib.import_module(module)
        except ConfigError as error:
            problems += [f"plugins has {module}; {line}" for line in str(error).splitlines()]
        except Exception as error:  # whatever a module of a user does
            problems.append(f"plugins has {module}; it cannot be imported: {type(error).__name__}: {error}")
    return problems


@dataclass(frozen=True)
class Job:
    """A row of the table of jobs."""

    function: str | Callable[..., None]
    """Runs the job, given (RunConfig, run folder, Dist); an entry is a place, `module:name`."""
    trains: tuple[str, ...] = ()
    """Roles that it trains; their models are built from the configuration."""
    rules: str | Callable[..., Iterator[str]] | None = None
    """Yields a sentence for each rule that a RunConfig of this job breaks, before anything heavy starts."""

    remains: str = "there is no checkpoint; {again} starts afresh"
    """Of a run that was stopped before its first checkpoint; `again` is the command that resumes it."""

    def run(self, *arguments: Any) -> None:
        loaded(self.function)(*arguments)

    def problems(self, config: Any) -> Iterator[str]:
        yield from loaded(self.rules)(config) if self.rules else ()


_RULES = "distill.config.checks"

JOBS: Registry[Job] = Registry(
    "job",
    {
        "teacher": Job("distill.run.teacher:teacher", ("teacher",)),
        "student": Job("distill.run.student:student", ("student",), f"{_RULES}:student_rules"),
        "codistill": Job("distill.run.codistill:codistill", ("teacher", "student"), f"{_RULES}:codistill_rules"),
        "backfill": Job(
            "distill.run.backfill:backfill",
            (),
            f"{_RULES}:backfill_rules",
            "what was labelled is published; {again} does what is left",
        ),
        "evaluate": Job("distill.run.evaluation:evaluate", (), f"{_RULES}:evaluate_rules"),
        "export": Job("distill.run.export:export", (), f"{_RULES}:export_rules"),
        "lab": Job(
            "distill.run.lab:lab",
            (),
            "distill.config.study_checks:lab_rules",
            "what was measured is in lab.evidence; the same command goes on from it",
        ),
    },
)


class Options(dict[str, Any]):
    """Options of a part below a key of the configuration; ConfigError where one is read that was not given."""

    def __init__(self, key: str, given: Mapping[str, Any]):
        super().__init__(given)
        self._key = key
        self._read: dict[str, None] = {}

    def __getitem__(self, name: str) -> Any:
        self._read[name] = None
        if name not in self:
            raise ConfigError(
                f"{self._key}.{name} has no value; allowed below {self._key}: {', '.join(self._read)}; given: "
                f"{', '.join(self) or 'none'}"
            )
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self._read[name] = None
        return super().get(name, default)


@dataclass(frozen=True)
class CodecEntry:
    """A row of the table of codecs: what a reader of cache.json needs, without torch."""

    codec: str | Callable[..., Any]
    """The codec's class, made from (CodecConfig, size of the vocabulary); an entry is a place, `module:name`."""
    parameters: tuple[str, ...] = ("options",)
    """Fields of `CodecConfig` that the codec reads; cache.json holds them."""
    rules: str | Callable[..., Iterator[str]] | None = None
    """Yields a sentence for each rule that a CodecConfig breaks, given the size of the vocabulary."""
    has_bucket: bool = False
    """Atoms are probabilities of distinct ids, and 1 minus their sum is that of all others: nothing is drawn."""

    def make(self, config: Any, vocab_size: int) -> Any:
        options = Options("cache.codec.options", config.options)
        return loaded(self.codec)(dataclasses.replace(config, options=options), vocab_size)

    def problems(self, config: Any, vocab_size: int) -> Iterator[str]:
        yield from loaded(self.rules)(config, vocab_size) if self.rules else ()


CODECS: Registry[CodecEntry] = Registry(
    "codec",
    {
        "systematic": CodecEntry("distill.cache.codecs.drawn:Systematic", ("draws",)),
        "threshold": CodecEntry("distill.cache.codecs.threshold:Threshold", ("tau",)),
        "multinomial": CodecEntry("distill.cache.codecs.drawn:Multinomial", ("draws",)),
        "topk": CodecEntry("distill.cache.codecs.topk:TopK", ("k",), f"{_RULES}:topk_rules", has_bucket=True),
    },
)


@dataclass(frozen=True)
class LossEntry:
    """A row of the table of the project's own losses; `distill.config.soft_losses` says what may use which targets."""

    place: str
    """`module:name` of the divergence, which `losses.divergences` describes."""
    options: Mapping[str, float] = field(default_factory=dict)
    """Keys of `student.loss_options` that it reads, with their defaults."""
    linear: bool = False
    """In p at temperature 1, up to terms without the student: targets of the right mean give the right gradient."""

    def divergence(self, options: Mapping[str, float]) -> Callable[..., Any]:
        """The divergence with its options, of those that the loss reads."""
        own = {name: value for name, value in options.items() if name != "temperature"}
        return functools.partial(loaded(self.place), **own)


_DIVERGENCES = "losses.divergences"
_FLAT = {"temperature": 1.0}

LOSSES: Registry[Any] = Registry(
    "loss",
    {
        "mixed": LossEntry(f"{_DIVERGENCES}:cross_entropy", linear=True),
        "forward_kl": LossEntry(f"{_DIVERGENCES}:forward_kl", _FLAT, linear=True),
        "reverse_kl": LossEntry(f"{_DIVERGENCES}:reverse_kl", _FLAT),
        "jensen_shannon": LossEntry(f"{_DIVERGENCES}:jensen_shannon", _FLAT | {"beta": 0.5}),
        "skew_kl": LossEntry(f"{_DIVERGENCES}:skew_kl", _FLAT | {"skew": 0.1}),
        "skew_reverse_kl": LossEntry(f"{_DIVERGENCES}:skew_reverse_kl", _FLAT | {"skew": 0.1}),
        "alpha_beta": LossEntry(f"{_DIVERGENCES}:alpha_beta", _FLAT | {"alpha": 0.2, "beta": 0.7}),
    },
)
"""Losses of the student. An entry of a user's module is a row function, which takes labels, what weighs them
(`losses.mixed.Weigh`), and the atoms' ids and probabilities."""
FACTORS: Registry[Any] = Registry(
    "factor",
    {
        "lag": "losses.factors:Lag",
        "entropy": "losses.factors:Entropy",
        "disagreement": "losses.factors:Disagreement",
        "variance": "losses.factors:Variance",
        "label_gap": "losses.factors:LabelGap",
        "shard_lag": "losses.shard_lag:ShardLag",
    },
)
"""Factors of alpha."""
DISPATCHERS: Registry[Any] = Registry("dispatcher", {"local": "distill.model.dispatch:LocalDispatcher"})
"""Ways of the MoE layer's rows to the experts and back."""


@dataclass(frozen=True)
class PrecisionEntry:
    """A row of the table of precisions."""

    numerics: str | Callable[..., Any]
    """Makes a `distill.model.precision.Numerics`, given (PrecisionConfig, device); an entry is a place,
    `module:name`."""
    options: tuple[str, ...] = ()
    """Keys of `precision` that it reads beside the name."""
    capability: tuple[int, int] = (0, 0)
    """Least compute capability of a GPU that has it."""


_NUMERICS = "distill.model.precision"

PRECISIONS: Registry[Any] = Registry(
    "precision",
    {
        "auto": PrecisionEntry(f"{_NUMERICS}:auto"),
        "fp32": PrecisionEntry(f"{_NUMERICS}:fp32"),
        "bf16": PrecisionEntry(f"{_NUMERICS}:bf16", ("native",), (8, 0)),
    },
)
"""An entry of a user's module may be a `distill.model.precision.Numerics` itself."""
