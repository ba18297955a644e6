"""Takes one half of a model with vision out of training."""

from distill.config.schema import Freeze
from distill.model.transformer import Transformer


def freeze(model: Transformer, what: Freeze) -> None:
    """Sets `requires_grad` of one half's parameters to False; the projector always trains.

    Args:
        what: `vision`, tower and adapter; `text`, embedding, layers, norm and head (the training loop leaves the router
            bias as it is, too); `none`.
    """
    if what is Freeze.none:
        return
    assert model.vision_model is not None, "only a model with vision has two halves"
    text = [model.embed, model.layers, model.norm, model.head]
    for part in [model.vision_model] if what is Freeze.vision else text:
        part.requires_grad_(False)
