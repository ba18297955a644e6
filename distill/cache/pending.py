"""Targets that a writer has accepted and not yet published, which a checkpoint can hold as plain tensors.

A run that stops between two shards keeps them in its checkpoint. If it published a short shard instead, its shards, and
the mean losses that a student takes from them, would differ from those of a run that was not stopped.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.cache.targets import Atoms

Array = NDArray[Any]


class Pending(NamedTuple):
    """One micro-batch on the CPU."""

    sample_ids_B: Array
    digests_B: Array
    atoms: Atoms
    label_logprob_T: Array
    entropy_T: Array
    valid_T: Array
    step: int
    tokens_seen: int
    teacher: str

    def tensors(self) -> dict[str, Tensor]:
        """All fields as tensors, by name."""
        named = self.atoms._asdict() | {"clock_2": torch.tensor([self.step, self.tokens_seen])}
        named["teacher"] = torch.tensor(list(self.teacher.encode()), dtype=torch.uint8)
        named["digests_B"] = torch.from_numpy(self.digests_B.view(np.int64))
        for name in ("sample_ids_B", "label_logprob_T", "entropy_T", "valid_T"):
            named[name] = torch.from_numpy(getattr(self, name))
        return named

    def select(self, keep_B: Array, sample_tokens: int) -> Pending:
        """The samples where `keep_B` (bool) holds."""
        if keep_B.all():
            return self
        keep_T = np.repeat(keep_B, sample_tokens)
        return self._replace(
            sample_ids_B=self.sample_ids_B[keep_B],
            digests_B=self.digests_B[keep_B],
            atoms=self.atoms.select(torch.from_numpy(keep_T)),
            label_logprob_T=self.label_logprob_T[keep_T],
            entropy_T=self.entropy_T[keep_T],
            valid_T=self.valid_T[keep_T],
        )

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Pending:
        """Inverse of `tensors`."""
        array = {name: tensor.numpy() for name, tensor in tensors.items()}
        step, tokens_seen = map(int, array["clock_2"])
        return cls(
            array["sample_ids_B"],
            array["digests_B"].view(np.uint64),
            Atoms(*(tensors[name] for name in Atoms._fields)),
            array["label_logprob_T"],
            array["entropy_T"],
            array["valid_T"],
            step,
            tokens_seen,
            bytes(array["teacher"]).decode(),
        )
