"""DeepSpeed, and nothing else knows it: one model under ZeRO 0 or 1, its optimizer steps and its state in the clear.

The DeepSpeed dictionary is generated here. Losses are sums over tokens: a step's gradient is that of the sum divided by
the number of valid tokens of the whole optimizer step, over all ranks and micro-batches, so a batch may be cut anyhow.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distill.config.errors import CheckpointError
from distill.config.schema import EngineConfig, OptimConfig
from distill.engine import optim
from distill.engine.dist import Dist
from distill.model import Transformer


class Engine:
    """A model in training. Every method is called on every rank.

    Args:
        model: on the CPU, in fp32; moved and cast here. Parameters that want no gradient have no optimizer state and
            stay as they are; a checkpoint holds them all the same (in bf16 as cast at the start).
        tensors: what `state` gave at a checkpoint, whole and by name; None starts afresh.
    """

    def __init__(
        self,
        model: Transformer,
        optim_config: OptimConfig,
        config: EngineConfig,
        precision: str,
        dist: Dist,
        tensors: dict[str, Tensor] | None = None,
    ):
        deepspeed = _deepspeed()
        self.dist = dist
        self.zero = config.zero
        self.moments = optim.moments(optim_config)
        if tensors is not None:
            load_weights(model, tensors)
        model.to(dist.device)
        optimizer = optim.build(model, optim_config)
        self._clip, self._norm = optim_config.clip, torch.zeros(())
        if config.zero == 0:
            # Stage 0 keeps the norm to itself, so we clip; in this hook gradients are already summed over ranks.
            optimizer.register_step_pre_hook(self._clip_gradients)
        self._ds, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,
                # One engine.step() is one update, whatever the number of backward passes before it.
                "managed_gradient_accumulation": False,
                "gradient_clipping": optim_config.clip if config.zero else 0.0,
                "zero_optimization": {"stage": config.zero},
                "zero_allow_untested_optimizer": True,
                "bf16": {"enabled": precision == "bf16"},
                "steps_per_print": None,
            },
        )
        self._trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._steps_before = 0.0 if tensors is None else float(tensors["optimizer_steps"])
        self._start_moments()
        if tensors is not None:
            self._load_moments(tensors)

    @property
    def model(self) -> Any:
        """The Transformer itself, for evaluation and bookkeeping; training goes through `step`."""
        return self._ds.module

    def step(self, losses: Iterable[Callable[[Any], Tensor]], valid_tokens: Tensor, lr: float) -> Tensor:
        """One optimizer step; returns the gradient norm before clipping (scalar tensor).

        Args:
            losses: one function per micro-batch of this rank; each gets the wrapped model and returns a loss *sum*.
            valid_tokens: scalar, of the whole step over all ranks.
            lr: of the schedule; parameters have their own factors on it (`distill.model.parametrization`).
        """
        # DeepSpeed averages gradients over ranks, so the world size undoes it.
        scale = self.dist.world / valid_tokens.clamp(min=1).float()
        for loss in losses:
            # A new tensor (the product): DeepSpeed hooks the engine's own output and would scale it again.
            self._ds.backward(loss(self._ds) * scale, scale_wrt_gas=False)
        optim.set_learning_rate(self._ds.optimizer, lr)
        self._ds.step()
        return self._norm if self.zero == 0 else torch.as_tensor(self._ds.get_global_grad_norm()).float()

    def weights_finite(self) -> Tensor:
        """Whether all weights that train are finite: bool, scalar, on the device; nothing waits for it.

        Sums, which cost half of a search, are finite only if all terms are; those of weights of 1e32 may overflow.
        """
        return torch.stack([p.detach().sum(dtype=torch.float32) for p in self._trainable.values()]).isfinite().all()

    def state(self) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """Names of all whole tensors that a checkpoint needs, and how to get each; the getters are collective."""
        for name, parameter in self.model.named_parameters():
            for key in ("param", *self.moments) if parameter.requires_grad else ("param",):
                yield f"{key}/{name}", partial(self._get, parameter, key)
        for name, buffer in _persistent_buffers(self.model):
            yield f"buffer/{name}", buffer.detach
        steps = self._steps_before + self._ds.global_steps
        yield "optimizer_steps", partial(torch.tensor, float(steps))

    def close(self) -> None:
        """Lets go of DeepSpeed's hooks and buffers; the process group stays for the next job."""
        self._ds.destroy()

    def _clip_gradients(self, *_: Any) -> None:
        parameters = list(self._trainable.values())
        self._norm = nn.utils.get_total_norm([p.grad for p in parameters])
        if self._clip > 0:
            nn.utils.clip_grads_with_norm_(parameters, self._clip, self._norm)

    def _get(self, parameter: nn.Parameter, key: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if not parameter.requires_grad:
            return parameter.detach().float()
        if self.zero == 0:
            return parameter.detach() if key == "param" else self._ds.optimizer.state[parameter][key]
        if key == "param":
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, key)

    def _start_moments(self) -> None:
        """Gives every parameter its optimizer state before the first step.

        DeepSpeed links ZeRO's partitions to their parameters after the step of the *first* parameter group, when the
        state of the others does not exist yet, and would never find theirs.
        """
        inner = self._ds.optimizer
        state = inner.state if self.zero == 0 else inner.optimizer.state
        for tensor in self._trainable.values() if self.zero == 0 else inner.single_partition_of_fp32_groups:
            state[tensor] = {key: torch.zeros_like(tensor) for key in self.moments}
            if "exp_avg" in self.moments:
                state[tensor]["step"] = torch.full((), self._steps_before, device=tensor.device)
        if self.zero > 0:
            inner._lazy_init_hp_params_optimizer_state()

    def _load_moments(self, tensors: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for name, parameter in self._trainable.items():
            for key in self.moments:
                value = tensors[f"{key}/{name}"].to(self.dist.device)
                if self.zero == 0:
                    self._ds.optimizer.state[parameter][key].copy_(value)
                else:
                    safe_set_full_optimizer_state(parameter, value, key)
            if self.zero > 0:
                # The model's own copy may be bf16; the master weights are what was saved.
                safe_set_full_fp32_param(parameter, tensors[f"param/{name}"].to(self.dist.device))


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    kept = model.state_dict(keep_vars=True)
    return ((name, kept[name]) for name, _ in model.named_buffers() if name in kept)


def load_weights(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Parameters and buffers of a checkpoint into a model; raises CheckpointError naming what does not fit."""
    stored = {k.split("/", 1)[1]: v for k, v in tensors.items() if k.startswith(("param/", "buffer/"))}
    own = model.state_dict()
    problems = [f"{k} is missing" for k in own.keys() - stored.keys()]
    problems += [f"{k} is unknown to the model" for k in stored.keys() - own.keys()]
    problems += [
        f"{k} has shape {list(stored[k].shape)}, the model's is {list(own[k].shape)}"
        for k in own.keys() & stored.keys()
        if stored[k].shape != own[k].shape
    ]
    if problems:
        raise CheckpointError("the checkpoint does not fit the model: " + "; ".join(sorted(problems)[:8]))
    model.load_state_dict(stored)


def _deepspeed() -> Any:
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        # Otherwise DeepSpeed compiles a shared-memory collective in C++ for a minute at the first start.
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed
