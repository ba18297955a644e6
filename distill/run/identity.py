"""The identity of a teacher: one notion for capture, checkpoints, exports and backfill.

A teacher in training is named by sixteen hex digits, its base, over all that decides its weights at every step:

- its first weights: the seed they are drawn with, or the digest of those that were loaded;
- its configuration: architecture, optimizer, parametrization, steps, batch, freeze, router losses, precision;
- its stream: the packed corpora by name and digest, their shares, the seed of the order.

Nothing else counts: not how often it is logged, evaluated or saved, how many checkpoints stay, whether it is captured
or tracked, how a batch is cut into ranks, micro-batches and chunks of the head, nor how a path, a share or a number of
epochs is spelt. A run that is resumed keeps the base that it started with, which its checkpoints hold.

A frozen teacher is its base and its step, `<base>@<step>`, wherever its checkpoint was moved to and also as a Hugging
Face folder that job=export wrote, while its files are those that were written. Other weights are the digest of
themselves. The precision in which a frozen teacher labels makes it no other.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from torch import nn

from distill.config.errors import CheckpointError
from distill.engine.checkpoint import Checkpoint, file_digest

EXPORTED = "codistill.json"
"""A file beside the weights of an exported teacher, with its lineage and step."""
LINEAGES = "lineages"
"""Of a checkpoint's state: the lineage of each teacher that it holds, by role."""
_FORMAT = 1
"""Goes into every base: raise it when the same parts would mean another training."""
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Lineage:
    """A teacher in training, as its checkpoints keep it."""

    base: str
    corpora: list[str]
    """Digests of those that it trains on."""
    tokens_per_step: int

    def at(self, step: int) -> str:
        """The identity of the teacher frozen at a step."""
        return f"{self.base}@{step}"


def base_of(parts: dict[str, Any]) -> str:
    """Sixteen hex digits over all that decides a teacher's weights: JSON-able values and enums, in any order."""
    return digest_of({"format": _FORMAT, **parts})


def digest_of(parts: Any) -> str:
    """Sixteen hex digits over JSON-able values and enums."""
    text = json.dumps(parts, sort_keys=True, default=lambda enum: enum.value)
    return xxhash.xxh3_64_hexdigest(text.encode())


def of_weights(model: nn.Module) -> str:
    """Sixteen hex digits of all parameters and kept buffers, by name and shape, rounded to fp32."""
    digest = xxhash.xxh3_64()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        digest.update(f"{name} {list(tensor.shape)} ".encode())
        for start in range(0, flat.numel(), _CHUNK):
            digest.update(flat[start : start + _CHUNK].float().cpu().numpy())
    return digest.hexdigest()


def stored(found: Checkpoint, role: str) -> tuple[Lineage, int] | None:
    """The lineage and the step of a checkpoint's teacher; None where it records none, as those of older versions."""
    record = found.state.get(LINEAGES, {}).get(role)
    return None if record is None else (Lineage(**record), int(found.state["roles"][role]["step"]))


def write_exported(folder: Path, teacher: Lineage, step: int) -> None:
    """Records in a folder the teacher whose weights it holds, and the digests of its files."""
    record = {"teacher": dataclasses.asdict(teacher), "step": step, "files": _files(folder)}
    (folder / EXPORTED).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def exported(folder: Path) -> tuple[Lineage, int] | None:
    """The lineage and the step of an exported teacher; None where the weights are not those that were exported.

    Raises:
        CheckpointError: the record is damaged.
    """
    path = folder / EXPORTED
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_bytes())
        found = Lineage(**record["teacher"]), int(record["step"])
        return found if record["files"] == _files(folder) else None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error}; remove it, and the weights are named by their digest"
        ) from error


def _files(folder: Path) -> dict[str, str]:
    """Digests of the files of weights."""
    return {path.name: file_digest(path) for path in sorted(folder.glob("*.safetensors"))}
