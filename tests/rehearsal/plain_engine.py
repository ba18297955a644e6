"""What stands for DeepSpeed in a rehearsal: the same few methods over plain autograd and a plain optimizer.

The backward pass walks the graph in Python: autograd's own engine asks the CUDA runtime for streams, and there is none.
So whatever is wrong raises in this thread, under the line that asked for it.
"""

from collections import Counter
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn


class PlainDeepSpeed:
    """One model in training."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]):
        assert config["zero_optimization"]["stage"] == 0, "at other stages DeepSpeed holds the weights"
        self.module, self.optimizer, self.global_steps = model, optimizer, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        # By this number activation checkpointing knows that a layer is computed again once for the whole pass.
        with torch.no_grad(), mock.patch.object(torch._C, "_current_graph_task_id", lambda: id(loss)):
            backward(loss)

    def step(self) -> None:
        self.optimizer.step()
        self.module.zero_grad()
        self.global_steps += 1


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> tuple[Any, ...]:
    return PlainDeepSpeed(model, optimizer, config), optimizer, None, None


def backward(loss: Tensor) -> None:
    """Adds the gradients of a scalar to `grad` of the leaves that it depends on."""
    root = loss.grad_fn
    assert root is not None
    waiting: Counter[Any] = Counter()
    todo, seen = [root], {root}
    while todo:
        for node, _ in todo.pop().next_functions:
            if node is not None:
                waiting[node] += 1
                if node not in seen:
                    seen.add(node)
                    todo.append(node)
    grads: dict[Any, list[Tensor | None]] = {root: [torch.ones_like(loss)]}
    ready = [root]
    while ready:
        node = ready.pop()
        below_edges = [edge for edge in node.next_functions if edge[0] is not None]
        for (below, number), grad in zip(below_edges, _apply(node, grads.pop(node, None)), strict=True):
            if grad is not None:
                held = grads.setdefault(below, [None] * max(len(below._input_metadata), number + 1))
                meta = below._input_metadata[number]
                dtype = getattr(getattr(below, "variable", None), "grad_dtype", meta.dtype)
                grad = grad.sum_to_size(meta.shape).to(dtype)  # as autograd's engine does
                held[number] = grad if (before := held[number]) is None else before + grad
            waiting[below] -= 1
            if not waiting[below]:
                ready.append(below)


def _apply(node: Any, grads: list[Tensor | None] | None) -> list[Tensor | None]:
    """The gradient for each edge that leads on."""
    leads_on = [below is not None for below, _ in node.next_functions]
    if grads is None:
        return [None] * sum(leads_on)
    if hasattr(node, "needs_input_grad"):  # written in Python, which counts on a gradient for every output
        for place, meta in enumerate(node._input_metadata):
            if grads[place] is None:
                grads[place] = torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device)
        leads_on, result = list(node.needs_input_grad), node.apply(*grads)
    else:
        result = node(*grads)
    result = result if isinstance(result, tuple) else (result,)
    return [grad for grad, wanted in zip(result, leads_on) if wanted]
