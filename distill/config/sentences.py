"""Exceptions of Hydra, OmegaConf and YAML as one sentence each."""

import re
from typing import Any

from hydra.errors import MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

_NOISE = ("full_key:", "object_type=", "reference_type=", "See https://", "Search path:", "Set the environment")


def key_of(problem: str) -> str:
    """The key that a sentence about a value begins with."""
    return problem.split(" ", 1)[0].rstrip(":")


def sentence(error: BaseException) -> str:
    """One line, whatever the exception is."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"{group} is {name}; allowed: {', '.join(error.options)}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and line.strip(" ^")]
    lines = [re.sub(r", set env var HYDRA_FULL_ERROR.*", "", line) for line in lines if not line.startswith(_NOISE)]
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and (not lines or lines[0].startswith("Error merging")):
        return " ".join([*lines[:1], sentence(cause)]) if lines else sentence(cause)
    text = " ".join(lines[:6]) or type(error).__name__
    if isinstance(error, KeyError | AssertionError | AttributeError | TypeError) and not isinstance(
        error, OmegaConfBaseException
    ):
        text = f"{type(error).__name__}: {text}"
    key = getattr(error, "full_key", None)
    return f"{key}: {text}" if key and str(key) not in text else text


def unresolved(config: Any, prefix: str = "", missing: bool = False) -> list[str]:
    """A sentence for each value `${...}` of a configuration, at any depth, that has no value or one of a wrong type.

    missing: also for each value that has to be given and is not.
    """
    problems: list[str] = []
    names = list(config) if isinstance(config, DictConfig) else range(len(config))
    for name in names:
        key = f"{prefix}{name}" if isinstance(config, DictConfig) else prefix.rstrip(".")
        node = config._get_node(name)
        if node is None or OmegaConf.is_missing(config, name):
            if node is not None and missing:
                problems.append(f"{key} has no value; set {key}=...")
            continue
        if OmegaConf.is_interpolation(config, name):
            try:
                _ = config[name]
            except InterpolationToMissingValueError:  # that key is missing, not this one
                continue
            except Exception as error:  # a resolver is any function
                problems.append(f"{key} is {node._value()}; {_way_out(error)}")
        elif isinstance(node, DictConfig | ListConfig) and node._value() is not None:
            problems += unresolved(node, f"{key}.", missing)
    return problems


def _way_out(error: Exception) -> str:
    text = sentence(error).split("raised while resolving interpolation: ", 1)[-1]
    text = re.sub(r"^[\w.]+: ", "", text)
    text = re.sub(r"^While dereferencing interpolation '[^']*': ", "", text).strip("\"'")
    text = re.sub(r"'distill\.config\.\w+\.(\w+)'", r"\1", text)
    if "Environment variable" in text:
        return f"{text.rstrip(chr(39))}: set it, or write ${{oc.env:NAME,DEFAULT}}"
    if "not found" not in text:
        return text
    return f"{text}: ${{KEY}} takes the value of another key, and a $ that is meant as such is written \\${{"
