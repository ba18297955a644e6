"""Which half of a model that sees stays as it is."""

from __future__ import annotations

from distill.config.schema import Freeze
from distill.model.transformer import Transformer


def freeze(model: Transformer, what: Freeze) -> None:
    """Takes the parameters of one half out of training: `requires_grad` becomes False; the projector always trains.

    Args:
        what: `vision`, tower and adapter; `text`, embedding, layers, norm and head (and whoever trains the model leaves
            its router bias alone); `none`.
    """
    if what is Freeze.none:
        return
    assert model.vision_model is not None, "only a model with sight has two halves"
    text = [model.embed, model.layers, model.norm, model.head]
    for part in [model.vision_model] if what is Freeze.vision else text:
        part.requires_grad_(False)
