"""Hugging Face checkpoints: a folder of safetensors and `config.json`, in and out."""

from pathlib import Path

import torch

from distill.config import stop
from distill.config.errors import DivergenceError
from distill.model.finite import is_finite
from distill.model.hf.parameter_names import VISION
from distill.model.hf.read_checkpoint import Reader
from distill.model.hf.text_config import config_from_json, config_to_json
from distill.model.hf.write_checkpoint import SaveReport, drops_router_bias, save
from distill.model.parts import PLAIN, Parts
from distill.model.transformer import Transformer

__all__ = ["VISION", "Reader", "SaveReport", "config_from_json", "config_to_json", "drops_router_bias", "load", "save"]


def load(
    folder: str | Path, dtype: torch.dtype | None = None, vision: bool = True, parts: Parts = PLAIN
) -> Transformer:
    """The model of a folder, on the CPU, router bias zero.

    Reads one file or shards with an index, text alone or with vision, experts fused or one by one, with or without FP8
    and its scales. Every header is checked before any weight is read, and each tensor is copied straight to its place.

    Args:
        dtype: of the parameters; None: torch's default.
        vision: False takes the text model alone of a folder that has both.
        parts: that the model is built of.

    Raises:
        CheckpointError: naming every file, key and shape that does not fit.
        DivergenceError: a weight is not finite; names file and key.
    """
    with Reader(folder, vision) as reader, torch.no_grad():
        with torch.device("meta"):
            model = Transformer(reader.config, parts).to(dtype or torch.get_default_dtype())
        model.to_empty(device="cpu")
        for name, parameter in stop.checked(model.named_parameters()):
            reader.read(name, parameter.view(-1))
            if not is_finite(parameter):
                raise DivergenceError(f"{reader.not_finite(name)} is not finite; no model starts from such weights")
        for router in model.routers:
            router.bias.zero_()
    return model
