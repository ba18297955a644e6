"""The precision of a run: settled when it starts, kept when it is resumed, and what of it decides a result."""

import dataclasses
from pathlib import Path
from typing import Any

from distill.config.errors import ConfigError
from distill.config.registry import PRECISIONS
from distill.config.schema import PrecisionConfig, RunConfig
from distill.engine.dist import Dist
from distill.model.precision import automatic, lacking
from distill.run.folder import recorded


def settled(config: RunConfig, folder: Path, dist: Dist) -> RunConfig:
    """The configuration with what `precision.name=auto` means: on this device, or where the run in the folder, if it
    is resumed, was started. Collective.

    Raises:
        ConfigError: a device lacks the precision.
    """
    name = config.precision.name
    if name == "auto":
        before = _recorded(folder) if config.resume and dist.is_main else None
        name = dist.from_main(before or automatic(dist.device))
    problems = [problem for problem in dist.gather(lacking(name, dist.device)) if problem is not None]
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    return dataclasses.replace(config, precision=dataclasses.replace(config.precision, name=name))


def decisive(precision: PrecisionConfig) -> str | dict[str, Any]:
    """What of a precision decides a result: its name and, where they are not the defaults, the options it reads."""
    options = {
        field.name: getattr(precision, field.name)
        for field in dataclasses.fields(precision)
        if field.name in getattr(PRECISIONS[precision.name], "options", ())
    }
    changed = {key: value for key, value in options.items() if value != getattr(PrecisionConfig(), key)}
    return {"name": precision.name, **changed} if changed else precision.name


def _recorded(folder: Path) -> str | None:
    try:
        name: str = recorded(folder)["precision"]["name"]
    except (ConfigError, KeyError, TypeError):  # a resume says of a damaged one what is wrong
        return None
    return name
