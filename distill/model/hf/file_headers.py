"""The tensors of a checkpoint's safetensors files, from headers alone: names every fault before any weight is read.

The safetensors library stops at the first damaged file and does not name the tensor that would end beyond it.
"""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from distill.config.errors import CheckpointError
from distill.config.files import LFS_CURE, is_lfs_pointer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_LARGEST_HEADER = 100_000_000
"""The library's own limit."""
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of a number by its dtype, as safetensors spells it."""
FP8 = "F8_E4M3"
_BYTES = FLOATS | {FP8: 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}

_OTHERS = {
    "consolidated*.pth": "is Meta's own format: convert it first (transformers' convert_llama4_weights_to_hf.py)",
    "*.bin": "files are pickles, which are never loaded: save the model as safetensors first",
}
"""Other formats, by the names of their files."""


class Stored(NamedTuple):
    """A tensor in a file of the folder."""

    file: str
    key: str
    dtype: str
    shape: list[int]
    start: int
    stop: int
    """Its bytes, counted from the end of the header."""


class Contents(NamedTuple):
    """The tensors of a checkpoint."""

    tensors: list[Stored]
    lost: set[str] | None
    """Keys of files that cannot be read; None: no index names them."""
    problems: list[str]
    """A sentence for each fault of files, headers and index."""


def contents(folder: Path) -> Contents:
    """Every tensor of a folder.

    Raises:
        CheckpointError: the folder holds no safetensors checkpoint, or its index is damaged.
    """
    tensors: list[Stored] = []
    lost: set[str] | None = set()
    listed, problems = _files(folder)
    for file, keys in listed.items():
        try:
            if Path(file).name != file or not (folder / file).is_file():  # an index may not point out of the folder
                raise CheckpointError(f"{folder / file} is named by {INDEX} but is no file of the folder")
            inside = _tensors(folder / file, problems)
        except CheckpointError as error:
            problems.append(str(error))
            lost = None if keys is None or lost is None else lost | keys
            continue
        tensors += inside
        if keys is not None:
            here = {tensor.key for tensor in inside}
            problems += [f"{file}: {key} is in {INDEX} but not in the file" for key in sorted(keys - here)]
            problems += [f"{file}: {key} is in the file but not in {INDEX}" for key in sorted(here - keys)]
    return Contents(tensors, lost, problems)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises CheckpointError that names the file."""
    try:
        _refuse_pointer(path)
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds {type(data).__name__}; it must be an object")
    return data


def _refuse_pointer(path: Path) -> None:
    if is_lfs_pointer(path):
        raise CheckpointError(f"{path} {LFS_CURE}")


def _files(folder: Path) -> tuple[dict[str, set[str] | None], list[str]]:
    """The files of the checkpoint with the keys that an index lists for each, and a sentence for each fault."""
    single = (folder / SINGLE).exists()
    if not (folder / INDEX).exists():
        if not single:
            instead = next(
                (f"; {pattern} {cure}" for pattern, cure in _OTHERS.items() if any(folder.glob(pattern))), ""
            )
            raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}{instead}")
        return {SINGLE: None}, []
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX}: weight_map must map keys to file names")
    files: dict[str, set[str]] = {}
    for key, file in sorted(weight_map.items(), key=lambda pair: pair[1]):
        files.setdefault(file.removeprefix("./"), set()).add(key)
    if SINGLE in files or not single:
        return dict(files), []
    return dict(files), [f"{folder} has {SINGLE} and an {INDEX} that does not name it; remove one of them"]


def _tensors(path: Path, problems: list[str]) -> list[Stored]:
    """The tensors of one file; faults of single tensors go into `problems`.

    Raises:
        CheckpointError: the header cannot be read.
    """
    header, data_bytes = _header(path)
    header.pop("__metadata__", None)
    tensors: list[Stored] = []
    for key, entry in header.items():
        try:
            dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers = (*shape, start, stop)
            valid = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in numbers) and start <= stop
        except (TypeError, KeyError, ValueError):
            valid = False
        if not valid:
            problems.append(f"{path.name}: {key} has no valid dtype, shape and data_offsets in the header: {entry}")
            continue
        tensors.append(Stored(path.name, key, dtype, shape, start, stop))
        due = math.prod(shape) * _BYTES.get(dtype, 0)
        if dtype in _BYTES and stop - start != due:
            problems.append(f"{path.name}: {key} has {stop - start} bytes; {dtype} {shape} takes {due}")
    problems += _gaps(path.name, sorted(tensors, key=lambda t: (t.start, t.stop, t.key)), data_bytes)
    return tensors


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """A file's header, and the number of bytes behind it."""
    damaged = f"{path} is damaged or no safetensors file:"
    try:
        _refuse_pointer(path)
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                claim = f"its header would be {length} bytes long" if size >= 8 else "8 bytes of header length are due"
                raise CheckpointError(f"{damaged} it has {size} bytes and {claim}")
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_no_twins)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{damaged} its header is no JSON ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{damaged} its header is no JSON object")
    return header, size - 8 - length


def _gaps(file: str, tensors: list[Stored], size: int) -> list[str]:
    """Faults of tensors that do not lie one after the other, from the header to the end of the file."""
    beyond = [tensor.key for tensor in tensors if tensor.stop > size]
    if beyond:
        last = max(tensor.stop for tensor in tensors)
        also = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        return [f"{file} is damaged: {beyond[0]}{also} would end beyond it; {size} of {last} bytes of data are there"]
    faults, end = [], 0
    for tensor in tensors:
        if tensor.start != end:
            begin = f"{tensor.key} begins at byte {tensor.start} of the data"
            faults.append(f"{file}: {begin}; the tensor before it ends at {end}")
        end = tensor.stop
    if end != size and not faults:
        faults.append(f"{file} is damaged: {size - end} bytes after its last tensor belong to none")
    return faults


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if twice := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
        raise ValueError(f"{', '.join(twice)} more than once")
    return dict(pairs)
