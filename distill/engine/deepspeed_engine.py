"""One model in training under DeepSpeed, which only this file and `layouts` use: its steps, and its state by name.

The DeepSpeed dictionary is generated here. Losses are sums over tokens: a step's gradient is that of the sum divided by
the number of valid tokens of the whole optimizer step, over all ranks and micro-batches, so a batch may be cut anyhow.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distill.config.errors import CheckpointError
from distill.config.schema import EngineConfig, OptimConfig
from distill.engine import optim
from distill.engine.dist import Dist
from distill.engine.layouts import LAYOUTS
from distill.model import Transformer


class Engine:
    """A model in training. Every method is called on every rank.

    Args:
        model: on the CPU, in fp32; moved and cast here. Parameters without gradient have no optimizer state and
            stay as they are; a checkpoint holds them all the same (in bf16 as cast at the start).
        dtype: of the model's weights and activations. What the optimizer moves, its moments, and a step's sum of
            gradients are fp32.
        tensors: what `state` gave at a checkpoint, whole and by name; None starts afresh.
    """

    def __init__(
        self,
        model: Transformer,
        optim_config: OptimConfig,
        config: EngineConfig,
        dtype: torch.dtype,
        dist: Dist,
        tensors: dict[str, Tensor] | None = None,
    ):
        deepspeed = _deepspeed()
        self.dist = dist
        if tensors is not None:
            load_weights(model, tensors)
        model.to(dist.device)
        optimizer = optim.build(model, optim_config)
        self.layout = LAYOUTS[config.zero](optimizer, optim.moments(optim_config), optim_config.clip, dtype)
        self._ds, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,
                # One engine.step() is one update, whatever the number of backward passes before it.
                "managed_gradient_accumulation": False,
                "zero_allow_untested_optimizer": True,
                "steps_per_print": None,
                **self.layout.config(),
            },
        )
        self._steps_before = 0.0 if tensors is None else float(tensors["optimizer_steps"])
        self.layout.bind(self._ds, self._steps_before)
        if tensors is not None:
            self.layout.load(tensors)

    @property
    def model(self) -> Any:
        """The Transformer itself, for evaluation and bookkeeping."""
        return self._ds.module

    @property
    def training_model(self) -> Any:
        """The Transformer as DeepSpeed wraps it, for forward passes that a backward pass follows."""
        return self._ds

    def backward(self, loss_sum: Tensor, valid_tokens: Tensor) -> None:
        """Adds a micro-batch's gradient to that of the step.

        Args:
            loss_sum: scalar, with the graph of a pass through `training_model`.
            valid_tokens: scalar, of the whole step over all ranks.
        """
        # DeepSpeed averages gradients over ranks, so the world size undoes it. The product is a new tensor: the model's
        # own output has DeepSpeed's hooks, which would scale it again.
        scale = self.dist.world / valid_tokens.clamp(min=1).float()
        self._ds.backward(loss_sum * scale, scale_wrt_gas=False)

    def update(self, lr: float) -> Tensor:
        """Clips the step's gradient and makes the update; returns the gradient norm before clipping (scalar tensor).

        Args:
            lr: of the schedule; parameters have their own factors on it (`distill.model.parametrization`).
        """
        optim.set_learning_rate(self._ds.optimizer, lr)
        self._ds.step()
        # DeepSpeed may write weights through views, which autograd does not see; casts of weights are kept until then.
        torch.autograd.graph.increment_version([*self.layout.trainable.values()])
        return self.layout.norm()

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Steps inside leave no trace in weights, moments or step counts; keeps a copy of them on the host."""
        before, steps = [tensor.to("cpu", copy=True) for tensor in self._changed()], self._ds.global_steps
        try:
            yield
        finally:
            for tensor, copy in zip(self._changed(), before, strict=True):
                tensor.copy_(copy)
            torch.autograd.graph.increment_version([*self.layout.trainable.values()])
            self._ds.global_steps = steps

    def _changed(self) -> list[Tensor]:
        """All of this rank that an update changes; what is optimized are the model's own weights, or copies of them."""
        tensors = (*self.layout.tensors(), *self.layout.trainable.values())
        return [tensor.detach() for tensor in {id(tensor): tensor for tensor in tensors}.values()]

    def weights_finite(self) -> Tensor:
        """Whether all weights that train are finite: bool, scalar, on the device; nothing waits for it.

        Sums, which cost half of a search, are finite only if all terms are; those of weights of 1e32 may overflow.
        """
        weights = self.layout.trainable.values()
        return torch.stack([p.detach().sum(dtype=torch.float32) for p in weights]).isfinite().all()

    def state(self) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """Names of all whole tensors that a checkpoint needs, and how to get each; the getters are collective."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                for key in ("param", *self.layout.moments):
                    yield f"{key}/{name}", partial(self.layout.whole, parameter, key)
            else:
                yield f"param/{name}", parameter.detach().float
        persistent = self.model.state_dict(keep_vars=True)
        for name, buffer in self.model.named_buffers():
            if name in persistent:
                yield f"buffer/{name}", buffer.detach
        steps = self._steps_before + self._ds.global_steps
        yield "optimizer_steps", partial(torch.tensor, float(steps))

    def close(self) -> None:
        """Frees DeepSpeed's hooks and buffers; the process group stays for the next job."""
        self._ds.destroy()


def load_weights(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Parameters and buffers of a checkpoint into a model; raises CheckpointError naming what does not fit."""
    stored = {k.split("/", 1)[1]: v for k, v in tensors.items() if k.startswith(("param/", "buffer/"))}
    try:
        model.load_state_dict(stored)
    except RuntimeError as error:
        problems = " ".join(str(error).split("\n", 1)[-1].split())
        raise CheckpointError(f"the checkpoint does not fit the model: {problems:.1000}") from error


def _deepspeed() -> Any:
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # It would print the memory in use, after a collection of garbage, twice for every group of parameters.
    bf16_optimizer.see_memory_usage = lambda *_, **__: None
    if not torch.cuda.is_available():
        # Otherwise DeepSpeed compiles a shared-memory collective in C++ for a minute at the first start.
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed
