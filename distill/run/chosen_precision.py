"""The precision of a run: settled when it starts, kept when it is resumed, and what of it decides a result."""

import dataclasses
from pathlib import Path
from typing import Any

from distill.config.errors import ConfigError
from distill.config.load import typed
from distill.config.registry import PRECISIONS
from distill.config.schema import PrecisionConfig, RunConfig
from distill.engine.dist import Dist
from distill.model.precision import automatic, lacking
from distill.run.folder import recorded


def settled(config: RunConfig, folder: Path, dist: Dist) -> RunConfig:
    """The configuration with what `precision.name=auto` means: on this device, or, if the run in the folder is resumed,
    what it was started with, options too. Collective.

    Raises:
        ConfigError: a device lacks the precision.
    """
    precision = config.precision
    if precision.name == "auto":
        before = _recorded(folder) if config.resume and dist.is_main else None
        precision = dist.from_main(before or dataclasses.replace(precision, name=automatic(dist.device)))
    problems = [problem for problem in dist.gather(lacking(precision.name, dist.device)) if problem is not None]
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    return dataclasses.replace(config, precision=precision)


def decisive(precision: PrecisionConfig) -> str | dict[str, Any]:
    """What of a precision decides a result: its name and, where they are not the defaults, the options it reads."""
    options = {
        field.name: getattr(precision, field.name)
        for field in dataclasses.fields(precision)
        if field.name in getattr(PRECISIONS[precision.name], "options", ())
    }
    changed = {key: value for key, value in options.items() if value != getattr(PrecisionConfig(), key)}
    return {"name": precision.name, **changed} if changed else precision.name


def _recorded(folder: Path) -> PrecisionConfig | None:
    try:
        before = typed(PrecisionConfig, recorded(folder)["precision"])
    except (ConfigError, KeyError, ValueError):  # a resume says of a damaged one what is wrong
        return None
    return before if before.name in PRECISIONS.names else None
