"""Models of a run: built from its configuration, or loaded from a run, a checkpoint or a Hugging Face folder."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from distill.config.checks import vision_problems
from distill.config.errors import ConfigError
from distill.config.load import to_dict, typed
from distill.config.model import moe_layers, rope_layers
from distill.config.schema import DataConfig, ModelConfig, VisionConfig
from distill.config.values import differences, shown
from distill.data.tokenizer import Tokenizer
from distill.engine import checkpoint
from distill.engine.checkpoint import Checkpoint
from distill.engine.deepspeed_engine import Engine, load_weights
from distill.model import Transformer, hf, hidden_projector
from distill.model.balance import degenerate_routers
from distill.model.freeze import freeze
from distill.model.parts import PLAIN, Parts
from distill.model.precision import numerics_of
from distill.run.run import Run


def parts_of(run: Run) -> Parts:
    """What the models of a run are built of."""
    return Parts.of(numerics_of(run.config.precision, run.dist.device), run.config.engine.dispatcher)


def first_model(run: Run, role: str) -> tuple[Transformer, Path | None]:
    """The model of a role with its first weights, on the CPU, and where they were loaded from (None: drawn).

    Of a run that goes on from a checkpoint the weights are any; `engine_of` loads them.
    """
    part, parts = getattr(run.config, role), parts_of(run)
    # The same student for every arm of a seed; another stream than the teacher's.
    torch.manual_seed(run.config.seed * 2 + (role == "student"))
    source = part.init_from or (run.config.init_from if len(run.roles) == 1 else None)
    if run.restored is not None or source is None:
        return Transformer(part.model, parts), None
    model = load_model(Path(source), role, part.model, parts)
    if layers := degenerate_routers(model):
        raise ConfigError(
            f"{role}.init_from is {source}; the routers of layers {layers} have equal rows and an equal bias: every "
            "token would go to the same experts, and no loss would show it. Give these routers random weights"
        )
    return model, Path(source)


def engine_of(run: Run, role: str, model: Transformer) -> Engine:
    """The model of a role under DeepSpeed; restored from the run's checkpoint, if there is one."""
    part = getattr(run.config, role)
    tensors = None if run.restored is None else run.restored.tensors(role)
    model.activation_checkpointing = part.train.activation_checkpointing
    freeze(model, part.train.freeze)
    dtype = numerics_of(run.config.precision, run.dist.device).dtype
    return Engine(model, part.optim, run.config.engine, dtype, run.dist, tensors)


def load_model(
    folder: Path,
    role: str,
    want: ModelConfig | None = None,
    parts: Parts = PLAIN,
    opened: Checkpoint | None = None,
) -> Transformer:
    """A model from a Hugging Face folder, a checkpoint of ours, or a run folder.

    Args:
        role: which model of a checkpoint that holds several.
        want: the architecture, or ConfigError names the keys that differ; of a model with vision the text model alone
            is taken where `want` has none. None takes what is there.
        parts: that the model is built of.
        opened: the checkpoint in the folder, where it is open already: its files need not be verified again.

    Raises:
        ConfigError: the architecture differs from `want`, or, before any weight is read, its products do not take a
            width.
    """
    with_vision = want is None or want.vision is not None
    try:
        if (folder / "config.json").exists():
            model = hf.load(folder, vision=with_vision, parts=parts)
        else:
            model = _from_checkpoint(opened or checkpoint.find(folder), role, with_vision, parts)
    except ConfigError as error:
        raise ConfigError(*[f"{folder}: {problem}" for problem in error.problems]) from error
    if want is not None:
        unlike = list(differences(architecture(want), architecture(model.config)))
        if unlike:
            raise ConfigError(
                *[f"{role}.model.{key} is {shown(a)}; the model in {folder} has {shown(b)}" for key, a, b in unlike]
            )
        model.config = want  # the same architecture in the run's spelling
    return model


def _from_checkpoint(opened: Checkpoint, role: str, with_vision: bool, parts: Parts) -> Transformer:
    name = role_in(opened, role)
    config = typed(ModelConfig, opened.state["models"][name])
    if not with_vision:
        config = dataclasses.replace(config, vision=None)
    model = Transformer(config, parts)
    tensors = hidden_projector.without(opened.tensors(name, ("param/", "buffer/")))
    if not with_vision:
        tensors = {key: t for key, t in tensors.items() if not key.removeprefix("param/").startswith(hf.VISION)}
    load_weights(model, tensors)
    return model


def role_in(opened: Checkpoint, role: str) -> str:
    """The model of a checkpoint that a job means by a role: it, or where there is none the first."""
    return role if role in opened.engines else opened.engines[0]


def check_vision(key: str, vision: VisionConfig | None, data: DataConfig, tokenizer: Tokenizer) -> None:
    """Raises ConfigError for a model that cannot take the images of a run, or has another token for them than the
    tokenizer."""
    if data.has_images and (problems := list(vision_problems(key, vision, data.images, tokenizer.image_ids().patch))):
        raise ConfigError(*problems)


def architecture(config: ModelConfig) -> dict[str, Any]:
    """What a model must share with another to take its weights and compute the same, however either spells it."""
    plain = to_dict(config)
    free = ("bos_id", "eos_ids", "pad_id", "init_std", "max_positions", "parametrization", "base")
    for key in (*free, "moe_step", "nope_step"):
        del plain[key]
    if config.chunk_size is not None and config.chunk_size >= config.max_positions:
        plain["chunk_size"] = None  # the Hugging Face format has no null here
    return plain | {"moe_layers": moe_layers(config), "rope_layers": rope_layers(config)}
