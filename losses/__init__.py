"""Pure functions of tensors: sums and per-token parts out, no configuration, no reduction choice, no logging.

Imports torch and nothing of ours. Shape letters: T tokens, D model, V vocabulary, K stored atoms, B samples, C corpora.
"""

from losses.head import HeadLoss, RowFunction, head_loss
from losses.mixed import Mixed, MixedLoss, fixed, mixed_loss
from losses.routing import routing_loss

__all__ = ["HeadLoss", "Mixed", "MixedLoss", "RowFunction", "fixed", "head_loss", "mixed_loss", "routing_loss"]
