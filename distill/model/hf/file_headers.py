"""What safetensors files hold, told from their headers alone: every fault of every file, before any weight is read.

The library stops at the first file that is not sound, and does not say which tensor lies beyond the end.
"""

from __future__ import annotations

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
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}


class Stored(NamedTuple):
    """A tensor in a file of the folder."""

    file: str
    key: str
    dtype: str
    shape: list[int]


def stored_tensors(folder: Path, problems: list[str]) -> tuple[list[Stored], set[str] | None]:
    """Every tensor of a checkpoint; what is wrong with files, headers and index goes into `problems`.

    Returns:
        The tensors, and the keys that are lost with files that cannot be read (None: no index says which they are).

    Raises:
        CheckpointError: the folder holds no safetensors checkpoint, or its index is not one.
    """
    promised = _files(folder, problems)
    tensors: list[Stored] = []
    lost: set[str] | None = set()
    for file, keys in promised.items():
        inside = Path(file).name == file  # an index may not point out of the folder
        found = _read(folder / file, inside, problems)
        if found is None:
            lost = None if keys is None or lost is None else lost | keys
            continue
        tensors += found
        if keys is not None:
            here = {tensor.key for tensor in found}
            problems += [f"{file}: {key} is in {INDEX} but not in the file" for key in sorted(keys - here)]
            problems += [f"{file}: {key} is in the file but {INDEX} does not say so" for key in sorted(here - keys)]
    return tensors, lost


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises CheckpointError that names the file."""
    try:
        if is_lfs_pointer(path):
            raise CheckpointError(f"{path} {LFS_CURE}")
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds {type(data).__name__}; it must be an object")
    return data


def _files(folder: Path, problems: list[str]) -> dict[str, set[str] | None]:
    """The files that make up the checkpoint, and the keys that an index promises in each."""
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}{_instead(folder)}")
        return {SINGLE: None}
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX}: weight_map must map keys to file names")
    files: dict[str, set[str]] = {}
    for file in sorted(set(weight_map.values())):
        keys = {key for key, where in weight_map.items() if where == file}
        files.setdefault(file.removeprefix("./"), set()).update(keys)
    if SINGLE not in files and (folder / SINGLE).exists():
        problems.append(f"{folder} has {SINGLE} and an {INDEX} that does not name it; remove the one that is not meant")
    return dict(files)


def _instead(folder: Path) -> str:
    if any(folder.glob("consolidated*.pth")):
        return (
            "; consolidated*.pth is Meta's own layout: convert it first (transformers' convert_llama4_weights_to_hf.py)"
        )
    if any(folder.glob("*.bin")):
        return "; *.bin files are pickles, which are never loaded: save the model as safetensors first"
    return ""


def _read(path: Path, inside: bool, problems: list[str]) -> list[Stored] | None:
    """The tensors of one file; None where the header cannot be read."""
    if not inside or not path.is_file():
        problems.append(f"{path} is named by {INDEX} but is no file of the folder")
        return None
    try:
        if is_lfs_pointer(path):
            problems.append(f"{path} {LFS_CURE}")
            return None
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                claim = f"its header would be {length} bytes long" if size >= 8 else "8 bytes of header length are due"
                problems.append(f"{path} is damaged or no safetensors file: it has {size} bytes and {claim}")
                return None
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_no_twins)
    except OSError as error:
        problems.append(f"{path} cannot be read: {error.strerror}")
        return None
    except (ValueError, RecursionError) as error:
        problems.append(f"{path} is damaged or no safetensors file: its header is no JSON ({error})")
        return None
    if not isinstance(header, dict):
        problems.append(f"{path} is damaged or no safetensors file: its header is no JSON object")
        return None
    header.pop("__metadata__", None)
    tensors: list[Stored] = []
    places: list[tuple[int, int, str]] = []
    for key, entry in header.items():
        try:
            dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
            sound = isinstance(dtype, str) and all(_is_count(n) for n in (*shape, start, stop)) and start <= stop
        except (TypeError, KeyError, ValueError):
            sound = False
        if not sound:
            problems.append(f"{path.name}: {key} has no sound dtype, shape and data_offsets in the header: {entry}")
            continue
        tensors.append(Stored(path.name, key, dtype, shape))
        places.append((start, stop, key))
        due = math.prod(shape) * _BYTES.get(dtype, 0)
        if dtype in _BYTES and stop - start != due:
            problems.append(f"{path.name}: {key} has {stop - start} bytes; {dtype} {shape} takes {due}")
    problems += _gaps(path.name, sorted(places), size - 8 - length)
    return tensors


def _gaps(file: str, places: list[tuple[int, int, str]], size: int) -> list[str]:
    """What keeps the tensors from lying one after the other, from the header to the end of the file."""
    beyond = [key for _, stop, key in places if stop > size]
    if beyond:
        last = max(stop for _, stop, _ in places)
        also = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        return [f"{file} is damaged: {beyond[0]}{also} would end beyond it; {size} of {last} bytes of data are there"]
    faults, at = [], 0
    for start, stop, key in places:
        if start != at:
            faults.append(f"{file}: {key} begins at byte {start} of the data; the tensor before it ends at {at}")
        at = stop
    if at != size and not faults:
        faults.append(f"{file} is damaged: {size - at} bytes after its last tensor belong to none")
    return faults


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise ValueError(f"{', '.join(twice)} more than once")
    return found
