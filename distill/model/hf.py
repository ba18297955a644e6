"""Hugging Face checkpoints of the text model: a folder of safetensors and `config.json`, in and out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill.config.errors import CheckpointError
from distill.config.files import sync
from distill.model.hf_config import config_from_json, config_to_json
from distill.model.transformer import Transformer

__all__ = ["SaveReport", "config_from_json", "config_to_json", "load", "save"]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PREFIX = "language_model."
_NOT_TEXT = ("vision_model.", "multi_modal_projector.")
_DTYPES = ("F64", "F32", "F16", "BF16")


class SaveReport(NamedTuple):
    """Held-out loss (nats per token) before and after the router bias was dropped; None: not measured, or no bias."""

    loss_with_bias: float | None
    loss_without_bias: float | None


def load(folder: str | Path) -> Transformer:
    """The model of a folder, on the CPU in torch's default dtype, router bias zero.

    Reads one file or shards with an index; of an image-and-text checkpoint the text model. Every header is checked
    before any weight is read, and each tensor is copied straight to its place.

    Raises:
        CheckpointError: naming every file, key and shape that does not fit.
    """
    folder = Path(folder)
    config = config_from_json(_json(folder / "config.json"), str(folder / "config.json"))
    with torch.device("meta"):
        model = Transformer(config)
    missing = {_hf_name(name): parameter for name, parameter in model.named_parameters()}
    problems: list[str] = []
    found: dict[str, list[tuple[str, str]]] = {}  # file: (key in it, our name for it in the format)
    for file, keys in _keys_by_file(folder, problems).items():
        found[file] = []
        with _opened(folder / file) as tensors:
            stored = set(tensors.keys())
            problems += [
                f"{file}: {key} is in {_INDEX} but not in the file" for key in sorted((keys or stored) - stored)
            ]
            for key in sorted(stored):
                name = key.removeprefix(_PREFIX)
                if key.startswith(_NOT_TEXT):
                    continue
                if name not in missing:
                    problems.append(f"{file}: {key} is unknown to the model")
                    continue
                view, shape = tensors.get_slice(key), list(missing.pop(name).shape)
                if view.get_shape() != shape:
                    problems.append(f"{file}: {key} has shape {view.get_shape()}; the model's is {shape}")
                if view.get_dtype() not in _DTYPES:
                    problems.append(f"{file}: {key} is stored as {view.get_dtype()}; allowed: {', '.join(_DTYPES)}")
                found[file].append((key, name))
    problems += [f"{folder}: {name} {list(tensor.shape)} is in no file" for name, tensor in missing.items()]
    if problems:
        raise CheckpointError("\n".join(problems))

    model.to_empty(device="cpu")
    target = {_hf_name(name): parameter for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for file, pairs in found.items():
            with _opened(folder / file) as tensors:
                for key, name in pairs:
                    target[name].copy_(tensors.get_tensor(key))
        for router in model.routers:
            router.bias.zero_()
    return model


def save(
    model: Transformer,
    folder: str | Path,
    *,
    drop_router_bias: bool = False,
    heldout_loss: Callable[[Transformer], float] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> SaveReport:
    """Writes the model so that transformers loads it; the folder appears whole or not at all.

    The format has no router bias. A model that was balanced with one routes otherwise without it, so that is refused
    unless asked for, and then what it costs is measured and printed.

    Args:
        folder: must not exist, or be empty.
        drop_router_bias: leave a nonzero bias out. The model itself keeps it.
        heldout_loss: loss of a model in nats per token, called with and without the bias.
        max_shard_bytes: size of a file, exceeded only by a single larger tensor.

    Raises:
        CheckpointError: for a nonzero router bias without `drop_router_bias`, or a folder that is in use.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not empty; a model is written to a new folder")
    biased = [layer for layer, router in enumerate(model.routers) if router.bias.any()]
    report = SaveReport(None, None)
    if biased:
        if not drop_router_bias:
            raise CheckpointError(
                f"{folder}: the router bias of MoE layers {biased} is not zero and the format cannot hold it; without "
                "it tokens go to other experts. Allow it with drop_router_bias=True"
            )
        report = _cost_of_dropping(model, heldout_loss)

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed here
    partial.mkdir(parents=True)
    try:
        _write(model, partial, max_shard_bytes)
        for path in (*partial.iterdir(), partial):
            sync(path)
        partial.rename(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return report


def _hf_name(name: str) -> str:
    """Name in the format of one of the model's parameters."""
    for own, theirs in (("embed.", "model.embed_tokens."), ("head.", "lm_head.")):
        if name.startswith(own):
            return theirs + name.removeprefix(own)
    return "model." + name


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds {type(data).__name__}; it must be an object")
    return data


def _keys_by_file(folder: Path, problems: list[str]) -> dict[str, set[str] | None]:
    """The files that make up the checkpoint, and the keys that an index promises in each."""
    if not (folder / _INDEX).exists():
        if not (folder / _SINGLE).exists():
            raise CheckpointError(f"{folder} has neither {_SINGLE} nor {_INDEX}")
        return {_SINGLE: None}
    weight_map = _json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{folder / _INDEX}: weight_map must map keys to file names")
    files: dict[str, set[str] | None] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or not (folder / file).is_file():
            problems.append(f"{folder / file} is named by {_INDEX} but is no file of the folder")
        else:
            files[file] = {key for key, where in weight_map.items() if where == file}
    return files


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from None


def _cost_of_dropping(model: Transformer, heldout_loss: Callable[[Transformer], float] | None) -> SaveReport:
    if heldout_loss is None:
        print("router bias dropped; its effect on held-out loss was not measured")
        return SaveReport(None, None)
    before = heldout_loss(model)
    kept = [router.bias.clone() for router in model.routers]
    try:
        for router in model.routers:
            router.bias.zero_()
        after = heldout_loss(model)
    finally:
        for router, bias in zip(model.routers, kept):
            router.bias.copy_(bias)
    print(f"router bias dropped; held-out loss {before:.4f} -> {after:.4f} nats per token ({after - before:+.4f})")
    return SaveReport(before, after)


def _write(model: Transformer, folder: Path, max_shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    room = max_shard_bytes
    total = 0
    for name, parameter in model.named_parameters():
        if shards[-1] and parameter.nbytes > room:
            shards.append({})
            room = max_shard_bytes
        shards[-1][_hf_name(name)] = parameter.detach()
        room -= parameter.nbytes
        total += parameter.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = _SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({key: tensor.contiguous().cpu() for key, tensor in shard.items()}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        _dump({"metadata": {"total_size": total}, "weight_map": weight_map}, folder / _INDEX)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    _dump(config_to_json(model.config) | {"dtype": dtype}, folder / "config.json")


def _dump(data: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
