"""How one ZeRO stage keeps parameters, gradients and optimizer state; whatever depends on the stage is here.

A layout is made before DeepSpeed and bound to its engine after it. All whole tensors are in fp32, and methods that
return one are collective.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Layout(ABC):
    """One model's placement.

    Args:
        moments: names of the optimizer's state tensors that have their parameter's shape.
        clip: largest global gradient norm; 0: any.
        dtype: of the model's own weights; the optimizer moves fp32 ones.

    Attributes:
        trainable: parameters that have optimizer state, by name.
    """

    stage: int

    def __init__(self, optimizer: torch.optim.Optimizer, moments: tuple[str, ...], clip: float, dtype: torch.dtype):
        self.optimizer, self.moments, self.clip, self.dtype = optimizer, moments, clip, dtype
        self.trainable: dict[str, nn.Parameter] = {}

    def config(self) -> dict[str, Any]:
        """The entries of DeepSpeed's dictionary that the stage decides."""
        return {"zero_optimization": {"stage": self.stage}, "gradient_clipping": self.clip}

    def bind(self, engine: Any, steps: float) -> None:
        """Gives every parameter of DeepSpeed's engine its optimizer state, before the first step of this process.

        steps: optimizer steps made before.
        """
        self.engine = engine
        self.trainable = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
        for tensor in self._optimized():
            state = {key: torch.zeros_like(tensor) for key in self.moments}
            if "exp_avg" in self.moments:
                state["step"] = torch.full((), steps, device=tensor.device)
            self._state()[tensor] = state

    def tensors(self) -> Iterator[Tensor]:
        """What is optimized on this rank, and its state."""
        for tensor in self._optimized():
            yield tensor
            yield from self._state()[tensor].values()

    @abstractmethod
    def _optimized(self) -> list[Tensor]:
        """What the optimizer moves on this rank."""

    @abstractmethod
    def _state(self) -> dict[Tensor, dict[str, Tensor]]:
        """Of the optimizer, by what it moves."""

    @abstractmethod
    def norm(self) -> Tensor:
        """Gradient norm of the last step before clipping, scalar."""

    @abstractmethod
    def whole(self, parameter: nn.Parameter, key: str) -> Tensor:
        """`param` or a moment of a trainable parameter."""

    @abstractmethod
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over the moments, and the parameters where the model's own copies may be rounded, of whole tensors
        `<moment>/<name>` and `param/<name>`."""


class Replicated(Layout):
    """ZeRO 0: everything is on every rank.

    DeepSpeed does not return the gradient norm here, so this class clips. In bf16 DeepSpeed would also sum the
    gradients of micro-batches in bf16; so to DeepSpeed the model is in fp32, and this class casts it afterwards: the
    model's weights collect gradients in fp32, and the optimizer moves fp32 copies of them.
    """

    stage = 0

    def __init__(self, optimizer: torch.optim.Optimizer, moments: tuple[str, ...], clip: float, dtype: torch.dtype):
        super().__init__(optimizer, moments, clip, dtype)
        self._norm = torch.zeros(())
        self._masters: dict[nn.Parameter, Tensor] = {}
        optimizer.register_step_pre_hook(self._clip_gradients)  # there gradients are already summed over ranks
        optimizer.register_step_post_hook(self._round_masters)

    def bind(self, engine: Any, steps: float) -> None:
        parameters = list(engine.module.parameters())
        self._masters = {p: p for p in parameters if p.requires_grad}
        if self.dtype is not torch.float32:
            for p in parameters:
                p.data = p.data.to(self.dtype)
                p.grad_dtype = torch.float32
            self._masters = {p: p.detach().float() for p in self._masters}
            for group in self.optimizer.param_groups:
                group["params"] = [self._masters[p] for p in group["params"]]
        super().bind(engine, steps)

    def config(self) -> dict[str, Any]:
        return super().config() | {"gradient_clipping": 0.0}

    def norm(self) -> Tensor:
        return self._norm

    def whole(self, parameter: nn.Parameter, key: str) -> Tensor:
        master = self._masters[parameter]
        return master.detach() if key == "param" else self._state()[master][key]

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.trainable.items():
            master = self._masters[parameter]
            master.detach().copy_(tensors[f"param/{name}"])
            for key in self.moments:
                self._state()[master][key].copy_(tensors[f"{key}/{name}"])

    def _optimized(self) -> list[Tensor]:
        return list(self._masters.values())

    def _state(self) -> dict[Tensor, dict[str, Tensor]]:
        return self.engine.optimizer.state

    def _clip_gradients(self, *_: Any) -> None:
        for parameter, master in self._masters.items():
            master.grad = parameter.grad
        masters = self._optimized()
        self._norm = nn.utils.get_total_norm([master.grad for master in masters if master.grad is not None])
        if self.clip > 0:
            nn.utils.clip_grads_with_norm_(masters, self.clip, self._norm)

    def _round_masters(self, *_: Any) -> None:
        for parameter, master in self._masters.items():
            if master is not parameter:
                parameter.detach().copy_(master)
                master.grad = None


class Partitioned(Layout):
    """ZeRO 1: each rank optimizes its part of the fp32 weights."""

    stage = 1

    def config(self) -> dict[str, Any]:
        if self.dtype is torch.float32:
            return super().config()
        # By default gradients would be summed in bf16, over micro-batches and then over ranks.
        fp32 = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
        return super().config() | fp32 | {"bf16": {"enabled": True}}

    def bind(self, engine: Any, steps: float) -> None:
        # DeepSpeed links partitions to their parameters once, after the step of the first parameter group, when the
        # other groups have no state yet. So all groups get state before, and are linked here.
        super().bind(engine, steps)
        engine.optimizer._lazy_init_hp_params_optimizer_state()

    def norm(self) -> Tensor:
        norm = self.engine.get_global_grad_norm()
        if isinstance(norm, Tensor):
            return norm.float()
        return torch.full((), norm, device=next(iter(self.trainable.values())).device)

    def whole(self, parameter: nn.Parameter, key: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if key == "param":
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, key)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for name, parameter in self.trainable.items():
            for key in self.moments:
                safe_set_full_optimizer_state(parameter, tensors[f"{key}/{name}"].to(parameter.device), key)
            safe_set_full_fp32_param(parameter, tensors[f"param/{name}"].to(parameter.device))

    def _optimized(self) -> list[Tensor]:
        optimizer = self.engine.optimizer  # DeepSpeed has one of its own for each dtype
        fp32 = self.dtype is torch.float32
        return list(optimizer.single_partition_of_fp32_groups if fp32 else optimizer.fp32_groups_flat_partition)

    def _state(self) -> dict[Tensor, dict[str, Tensor]]:
        return self.engine.optimizer.optimizer.state


LAYOUTS: dict[int, type[Layout]] = {layout.stage: layout for layout in (Replicated, Partitioned)}
"""By ZeRO stage."""
