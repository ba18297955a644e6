"""Writes a checkpoint: a folder that transformers loads, and that appears whole or not at all."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from distill.config import stop
from distill.config.errors import CheckpointError, DivergenceError
from distill.config.files import publish_folder, write_text
from distill.config.model import moe_layers
from distill.config.paths import home
from distill.model.finite import is_finite
from distill.model.hf.file_headers import INDEX, SINGLE
from distill.model.hf.parameter_names import TEXT, VISION, hf_name
from distill.model.hf.text_config import config_to_json, token_ids
from distill.model.tensors import save_tensors
from distill.model.transformer import Transformer


class SaveReport(NamedTuple):
    """Held-out loss (nats per token) before and after the router bias was dropped; None: not measured, or no bias."""

    loss_with_bias: float | None
    loss_without_bias: float | None


def save(
    model: Transformer,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    drop_router_bias: bool = False,
    heldout_loss: Callable[[Transformer], float] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    also: Callable[[Path], None] | None = None,
) -> SaveReport:
    """Writes the model so that transformers loads it; the folder appears whole or not at all.

    Beyond the model one shard is in memory at most.

    Args:
        folder: must not exist, or be empty.
        dtype: of the weights in the files; None: the model's own.
        drop_router_bias: leave a nonzero bias out, and print what that costs. The model itself keeps it.
        heldout_loss: loss of a model in nats per token, called with and without the bias.
        max_shard_bytes: size of a file, exceeded only by a single larger tensor.
        also: writes further files into a folder that it gets, before the whole appears.

    Raises:
        CheckpointError: for a nonzero router bias without `drop_router_bias`, a folder that is not empty, or a model
            that the format cannot hold.
        DivergenceError: a weight is not finite, or not in `dtype`; names the first.
    """
    folder = Path(home(str(folder))).absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not empty; a model is written to a new folder")
    config_to_json(model.config)
    biased = drops_router_bias(model, drop_router_bias)
    report = _cost_of_dropping(model, heldout_loss) if biased else SaveReport(None, None)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed here
    partial.mkdir(parents=True)
    try:
        _write(model, partial, dtype or next(model.parameters()).dtype, max_shard_bytes)
        if also is not None:
            also(partial)
        publish_folder(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return report


def drops_router_bias(model: Transformer, allowed: bool, key: str = "drop_router_bias") -> bool:
    """Whether the format, which has no router bias, drops one of the model that is not zero.

    Args:
        key: of `allowed`, for the message.

    Raises:
        CheckpointError: it does, and that is not allowed.
    """
    biased = [layer for layer, router in zip(moe_layers(model.config), model.routers) if router.bias.any()]
    if biased and not allowed:
        raise CheckpointError(
            f"{key} is false; the router bias of layers {biased} is not zero and the format cannot hold it: with true "
            "it is left out, tokens go to other experts, and what that costs on held-out text is measured"
        )
    return bool(biased)


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


def _write(model: Transformer, folder: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    shards: list[dict[str, nn.Parameter]] = [{}]
    room, total = max_shard_bytes, 0
    for name, parameter in stop.checked(model.named_parameters()):
        size = parameter.numel() * dtype.itemsize
        if shards[-1] and size > room:
            shards.append({})
            room = max_shard_bytes
        key = hf_name(name)
        shards[-1][key if model.config.vision is None or key.startswith(VISION) else TEXT + key] = parameter
        room -= size
        total += size
    weight_map: dict[str, str] = {}
    for number, shard in stop.checked(enumerate(shards, 1)):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {key: parameter.detach().to("cpu", dtype).contiguous() for key, parameter in shard.items()}
        if broken := [key for key in tensors if not is_finite(tensors[key])]:
            kind = str(dtype).removeprefix("torch.")
            raise DivergenceError(f"{broken[0]} is not finite in {kind}; the model is not written")
        save_tensors(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        del tensors  # before the next shard is made
    if len(shards) > 1:
        _dump({"metadata": {"total_size": total}, "weight_map": weight_map}, folder / INDEX)
    _dump(config_to_json(model.config) | {"dtype": str(dtype).removeprefix("torch.")}, folder / "config.json")
    ids = {key: value for key, value in token_ids(model.config).items() if value is not None}
    _dump(ids, folder / "generation_config.json")


def _dump(data: dict[str, Any], path: Path) -> None:
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")
