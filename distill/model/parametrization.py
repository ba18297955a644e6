"""Initial scales and optimizer factors under which one learning rate fits every width, depth and expert size.

The published rules put constants into the forward pass: 1/mL on every residual branch, 1/mN on the logits. Here there
are none. Under Adam with decoupled weight decay a matrix W that is used as a W trains exactly as one that is used as it
is and has its initial standard deviation and learning rate times a, its eps and weight decay over a: the gradient of
the product is 1/a of that of W, and only eps makes Adam's step depend on its size. So all constants are absorbed, and
the model is at every moment a plain checkpoint of the family.

Factors, with the ratios mN, mL, mM of hidden_size, layers and the feed-forward's width M (expert_hidden, dense_hidden)
to `model.base`; the width of all heads is taken to grow with hidden_size, the channels of a head not to:

    parameter                initial std                 learning rate   eps          weight decay
    embedding, projector     1                           1               1/mN         1
    q, k, v                  mN^-1/2                     1/mN            1/(mN mL)    mN
    o                        mN^-1/2 / mL                1/(mN mL)       1/mN         mN mL
    gate, up                 mN^-1/2                     1/mN            1/(mM mL)    mN
    down                     min(mM^-1/2, mN^1/2/mM)/mL  1/(mM mL)       1/mN         mM mL
    router                   mN^-1/2                     1/mN            1/mL         mN
    norms of layers          (1 always)                  1               1/(mN mL)    1
    last norm                (1 always)                  1               1/mN         1
    head, hidden projector   1/mN                        1/mN            1            mN

Sources: CompleteP (arXiv 2505.01618, alpha = 1) for width and depth, Complete(d)P (2512.22382) for eps and weight
decay, 2601.20205 for experts and router (which allows 1/mN and mN^-1/2 as the router's initial scale). Ours:
- router: mN^-1/2, since selection is a contest between initial and learned logits, and only so do both keep their size;
- down: the smaller of mean-field and fan-in, since mean-field alone grows without bound where the width outgrows M;
- eps: 1 over the size of the gradient, which gives down 1/mN at any M and the router 1/mL.

Every factor is 1 at the base sizes, whatever they are: there `transfer` is `standard`, and hyperparameters found with
`standard` stay valid. What does not transfer: another number of channels per head (the released attention scale
1/sqrt(C) stays; vary the number of heads, of queries and of keys alike), another share of active experts, SGD.
"""

import re
from typing import NamedTuple

from distill.config.schema import ModelConfig, Parametrization


class Scales(NamedTuple):
    """Factors on a parameter's initial std, learning rate, eps and weight decay."""

    init: float = 1.0
    lr: float = 1.0
    eps: float = 1.0
    weight_decay: float = 1.0


def scales(config: ModelConfig, name: str) -> Scales:
    """Factors of the Transformer's parameter `name`; all 1 under `standard` and in the vision tower.

    The projector of images is an input layer like the embedding: its inputs are the tower's, which has one size, and
    its outputs are rows beside the embedding's.
    """
    if config.parametrization is Parametrization.standard or name.startswith("vision_model."):
        return Scales()
    base = config.base
    width, depth = config.hidden_size / base.hidden_size, config.layers / base.layers
    hidden = config.dense_hidden / base.dense_hidden
    if ".experts." in name or ".shared_expert." in name:
        hidden = config.expert_hidden / base.expert_hidden
    down = min(hidden**-0.5, width**0.5 / hidden)
    table = {
        r"embed\.|multi_modal_projector\.": Scales(1, 1, 1 / width, 1),
        r".*\.[qkv]_proj\.": Scales(width**-0.5, 1 / width, 1 / (width * depth), width),
        r".*\.o_proj\.": Scales(width**-0.5 / depth, 1 / (width * depth), 1 / width, width * depth),
        r".*\.(gate_proj|up_proj|gate_up_proj)\b": Scales(width**-0.5, 1 / width, 1 / (hidden * depth), width),
        r".*\.down_proj\b": Scales(down / depth, 1 / (hidden * depth), 1 / width, hidden * depth),
        r".*\.router\.": Scales(width**-0.5, 1 / width, 1 / depth, width),
        r".*layernorm\.": Scales(1, 1, 1 / (width * depth), 1),
        r"norm\.": Scales(1, 1, 1 / width, 1),
        r"(head|hidden_projector)\.": Scales(1 / width, 1 / width, 1, width),
    }
    matches = [factors for pattern, factors in table.items() if re.match(pattern, name)]
    assert len(matches) == 1, f"{name} has {len(matches)} rules"
    return matches[0]
