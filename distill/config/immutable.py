"""Dataclasses of the schema: their attributes cannot be set, `dataclasses.replace` makes another one."""

from dataclasses import dataclass, field
from typing import TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen(kind: type[T]) -> type[T]:
    """A frozen dataclass into which OmegaConf merges values, which it does not where the class is marked as frozen."""
    made = dataclass(frozen=True)(kind)
    made.__dataclass_params__.frozen = False  # type: ignore[attr-defined]
    return made
