"""Pure functions of tensors: sums and per-token parts out, no configuration, no reduction choice, no logging.

Imports torch and nothing of ours. Shape letters: T tokens, D model, V vocabulary, K stored atoms.
"""

from losses.mixed import MixedLoss, mixed_loss
from losses.routing import routing_loss

__all__ = ["MixedLoss", "mixed_loss", "routing_loss"]
