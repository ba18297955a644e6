"""Checkpoints that are whole or not there, also after a crash, and that do not depend on the world size.

    checkpoints/step-00000120/
        teacher-00000.safetensors     whole parameters, moments and buffers by name; rank r holds every W-th of them
        rest-00000.safetensors        where a signal cut an interval: what rank r had begun and not yet written
        manifest.json                 written last: step, state, sizes and digests of the files

Everything is written into a folder with another name, fsynced and renamed. A loader takes the newest folder whose
manifest and files check, so a half-written or damaged one costs some steps, never the run. All tensors are finite: a
model that has diverged is neither saved nor loaded.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distill.config.errors import CheckpointError, DivergenceError
from distill.config.files import publish_folder, reason, write_text
from distill.engine.deepspeed_engine import Engine
from distill.engine.dist import Dist
from distill.model.finite import is_finite
from distill.model.tensors import save_tensors

FORMAT = 2
REST = "rest"
_NAME = re.compile(r"step-(\d{8})")
log = logging.getLogger(__name__)


def save(
    root: Path,
    step: int,
    engines: dict[str, Engine],
    state: dict[str, Any],
    dist: Dist,
    keep: int,
    rest: dict[str, Tensor] | None = None,
) -> Path:
    """Writes `root/step-N`; collective. Of older checkpoints the newest `keep - 1` stay.

    Args:
        state: JSON-able; everything else that a resumed run needs. Rank 0's is kept.
        rest: tensors that each rank has of its own.

    Raises:
        CheckpointError: on every rank, where any of them cannot write. Older checkpoints stay; the part that was
            written is removed, which frees a full disk of it.
        DivergenceError: likewise, where a tensor is not finite.
    """
    final = root / f"step-{step:08d}"
    temporary = root / f"step-{step:08d}.tmp"
    mine = _Written({}, [], None)
    if dist.is_main:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        except OSError as error:
            mine = mine._replace(problem=reason(error))
    dist.barrier()
    for name, engine in engines.items():
        share = {}
        for index, (key, get) in enumerate(engine.state()):
            tensor = get()  # collective, so also on ranks that do not keep it
            if index % dist.world == dist.rank:
                share[key] = _on_host(tensor)  # at once: the device has no room for all of them
        mine = mine.then(temporary / f"{name}-{dist.rank:05d}.safetensors", share, name)
    if rest:
        mine = mine.then(
            temporary / f"{REST}-{dist.rank:05d}.safetensors", {key: _on_host(tensor) for key, tensor in rest.items()}
        )
    every = dist.gather(mine)
    first = min((key for part in every for key in part.broken), default=None)
    problem = next((part.problem for part in every if part.problem), None)
    if dist.is_main and first is None and problem is None:
        files = {name: entry for part in every for name, entry in part.files.items()}
        manifest = {"format": FORMAT, "step": step, "files": files, "engines": list(engines), "state": state}
        problem = _publish(temporary, final, json.dumps(manifest, allow_nan=False), keep)
    problem = dist.from_main(problem)
    if first or problem:
        if dist.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        if first:
            raise DivergenceError(f"{first} is not finite: {final} is not written; the last good one is {last(root)}")
        raise CheckpointError(f"{temporary}: cannot write the checkpoint: {problem}")
    return final


class _Written(NamedTuple):
    """What one rank has written of a checkpoint."""

    files: dict[str, dict[str, Any]]
    """Size and digest by file name."""
    broken: list[str]
    """Tensors that are not finite."""
    problem: str | None

    def then(self, path: Path, tensors: dict[str, Tensor], engine: str | None = None) -> "_Written":
        """After one more file; engine: whose tensors they are, which must be finite."""
        broken = [f"{engine}: {key}" for key, tensor in tensors.items() if engine and not is_finite(tensor)]
        files, problem = {}, self.problem
        try:
            if problem is None:
                save_tensors(tensors, path)
                files = {path.name: {"bytes": path.stat().st_size, "xxh3": file_digest(path)}}
        except (OSError, SafetensorError) as error:
            problem = reason(error)
        return _Written(self.files | files, self.broken + broken, problem)


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


def _publish(temporary: Path, final: Path, manifest: str, keep: int) -> str | None:
    """Writes the manifest and renames the folder; the problem, if that fails."""
    try:
        write_text(temporary / "manifest.json", json.dumps({"xxh3": _text_digest(manifest), "manifest": manifest}))
        if final.exists():  # of a run that was resumed from an older one
            shutil.rmtree(final)
        publish_folder(temporary, final)
        for old in _folders(final.parent)[keep:]:
            shutil.rmtree(old)
    except OSError as error:
        return reason(error)
    return None


class Checkpoint:
    """One valid checkpoint: `folder`, `step`, `engines`, `state`, and its tensors."""

    def __init__(self, folder: Path):
        """Reads and checks the manifest and every file's digest; raises CheckpointError that names the bad file."""
        self.folder = folder
        path = folder / "manifest.json"
        try:
            outer = json.loads(path.read_text())
            if _text_digest(outer["manifest"]) != outer["xxh3"]:
                raise ValueError("its digest does not match")
            manifest = json.loads(outer["manifest"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: not a valid manifest ({error})") from error
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {manifest['format']}; this version reads {FORMAT}")
        for name, entry in manifest["files"].items():
            file = folder / name
            size = file.stat().st_size if file.exists() else -1
            if size != entry["bytes"]:
                raise CheckpointError(f"{file}: {size} bytes; its manifest has {entry['bytes']}")
            if file_digest(file) != entry["xxh3"]:
                raise CheckpointError(f"{file}: its bytes do not match the digest in the manifest")
        self.step: int = manifest["step"]
        self.engines: list[str] = manifest["engines"]
        self.state: dict[str, Any] = manifest["state"]
        self._files = list(manifest["files"])

    def tensors(self, engine: str, prefixes: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
        """Whole tensors of one engine by name, those that start with one of `prefixes`.

        Raises:
            CheckpointError: it holds no such engine, or a file is damaged.
            DivergenceError: one of them is not finite (a run of a version that saved these); names file and tensor.
        """
        if engine not in self.engines:
            raise CheckpointError(f"{self.folder}: holds {', '.join(self.engines)}; {engine} is not among them")
        return {key: tensor for _, part in self._parts(engine, prefixes) for key, tensor in part.items()}

    def rest(self, rank: int, world: int) -> list[dict[str, Tensor]]:
        """What a rank has to go on with: its own, and where there were more ranks, that of some of them."""
        return [tensors for number, tensors in self._parts(REST, ("",)) if number % world == rank]

    def _parts(self, name: str, prefixes: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """By the rank that wrote them."""
        for file_name in self._files:
            if (match := re.fullmatch(re.escape(name) + r"-(\d{5})\.safetensors", file_name)) is None:
                continue
            try:
                with safe_open(self.folder / file_name, framework="pt") as file:
                    part = {k: file.get_tensor(k) for k in file.keys() if k.startswith(prefixes)}  # noqa: SIM118
            except SafetensorError as error:
                raise CheckpointError(f"{self.folder / file_name}: {error}") from error
            for key, tensor in sorted(part.items()):
                if name != REST and not is_finite(tensor):
                    raise DivergenceError(
                        f"{self.folder / file_name}: {key} is not finite; the model has diverged: take an older "
                        "checkpoint"
                    )
            yield int(match[1]), part


def newest(root: Path) -> Checkpoint | None:
    """The newest checkpoint that checks; damaged ones are reported and passed over. None: there is none.

    Raises:
        CheckpointError: there are some, and each is damaged.
    """
    problems = []
    for folder in _folders(root):
        try:
            return Checkpoint(folder)
        except CheckpointError as error:
            log.warning("passed over a damaged checkpoint: %s", error)
            problems.append(str(error))
    if problems:
        raise CheckpointError(f"{problems[0]}; {root} has no other checkpoint that is whole: to start over, remove it")
    return None


def last(root: Path) -> Path | None:
    """The folder of the newest checkpoint, by its name alone."""
    return next(iter(_folders(root)), None)


def find(folder: Path) -> Checkpoint:
    """The checkpoint that a person means by a folder: a checkpoint, a folder of them, or a run."""
    if (folder / "manifest.json").exists():
        return Checkpoint(folder)
    for root in (folder, folder / "checkpoints"):
        if (checkpoint := newest(root)) is not None:
            return checkpoint
    raise CheckpointError(f"{folder}: neither a Hugging Face folder (config.json) nor a checkpoint of ours")


def clear_half_written(root: Path) -> None:
    """Removes what a killed run left unfinished."""
    for path in root.glob("*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _folders(root: Path) -> list[Path]:
    return sorted((path for path in root.glob("step-*") if _NAME.fullmatch(path.name)), reverse=True)


def file_digest(path: Path) -> str:
    """xxh3-64 of a file's bytes as 16 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()  # type: ignore[arg-type]


def _text_digest(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode())
