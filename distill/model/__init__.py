"""The shared MoE core: one Transformer of the Llama 4 family; counts, load balancing, Hugging Face checkpoints."""

from distill.model.parts import Parts
from distill.model.segments import Segments
from distill.model.transformer import Routing, Transformer

__all__ = ["Parts", "Routing", "Segments", "Transformer"]
